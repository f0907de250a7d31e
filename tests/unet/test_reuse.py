import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastgrpo
from fastgrpo.rollout import initial_noise
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.workers import Workers
from fastgrpo.unet import reuse
from fastgrpo.unet.attention import AttentionProcessor
from fastgrpo.unet.fused import patch_unet
from fastgrpo.unet.lora import add_lora
from fastgrpo.unet.reuse import (
    DistinctRows,
    RememberedText,
    RememberedTimes,
    Reuse,
    TimesOfRows,
    choose_reuse,
    distinct_rows,
    enable_reuse,
    forward_distinct,
    same_bits,
)
from support.sd_pipelines import build_unet

REAL = Path(fastgrpo.__file__).parent / "models"
ROWS, TOKENS = 6, 5
TIMESTEPS = torch.tensor([981, 741, 501, 261, 1])
STEPS = torch.tensor([3, 0, 4, 0, 1, 2])  # a step for every row: more than a rollout asks for
KINDS = (
    "plain",
    "sd2",
    "lora",
    "patched",
    "old processor",
    "own processor",
    "channels last",
    "bfloat16",
    "scale_shift",
)

# Two levels instead of four.
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}


def make_unet(kind: str = "plain") -> UNet2DConditionModel:
    """Every weight random, also those that a fresh UNet or adapter has as ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changes = {"resnet_time_scale_shift": "scale_shift"} if kind == "scale_shift" else {}
        changes |= {"attention_head_dim": (2, 4)} if kind == "sd2" else {}
        unet = build_unet("sd2" if kind == "sd2" else "sd1", **SMALL, **changes)
        if kind == "lora":
            targets = ("to_k", "to_v", "time_emb_proj", "linear_1", "conv1")
            add_lora(unet, ModelConfig(lora_rank=2, lora_targets=targets), seed=0, frozen_dtype=torch.float32)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    if kind == "patched":
        patch_unet(unet)
    elif kind == "old processor":
        unet.set_attn_processor(AttnProcessor())
    elif kind == "own processor":
        unet.set_attn_processor(AttentionProcessor("sdpa"))
    elif kind == "channels last":
        unet.to(memory_format=torch.channels_last)
    elif kind == "bfloat16":
        unet.to(torch.bfloat16)
    return unet.eval()


def inputs(unet: UNet2DConditionModel, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and contexts of ROWS rows."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(ROWS, 4, 8, 8, generator=generator)
    contexts = torch.randn(ROWS, TOKENS, unet.config.cross_attention_dim, generator=generator)
    return latents.to(unet.dtype), contexts.to(unet.dtype)


def call(unet: UNet2DConditionModel) -> Callable[..., Tensor]:
    return lambda latents, timesteps, contexts: unet(latents, timesteps, contexts, return_dict=False)[0]


def spoil(unet: UNet2DConditionModel, *names: str) -> None:
    """Weights that nobody may read."""
    parameters = [p for name, p in unet.named_parameters() if any(f".{part}." in f".{name}" for part in names)]
    assert parameters
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(torch.nan)


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# Sums of a few hundred terms in some 50 layers, in another order: 1e-12 with float64's 1e-16, 1e-3 with float32's 6e-8,
# if nothing cancels, and a hundredth of that since roundings do. What reads a wrong row, step or context is off by
# 1e-2.
SUMMED_OTHERWISE = {torch.float64: 1e-12, torch.float32: 1e-4}


def precise(unet: UNet2DConditionModel, kind: str) -> UNet2DConditionModel:
    """In float64, but for the operators of `patch_unet`, which do not know it."""
    return unet if kind == "patched" else unet.double()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_remembered_text_leaves_every_bit(kind: str, grad: bool) -> None:
    """The projections are computed at the shapes they always have; then they are not read again."""
    unet = make_unet(kind)
    latents, contexts = inputs(unet)
    plain = call(unet)(latents, TIMESTEPS[STEPS], contexts)
    enable_reuse(unet)
    text = RememberedText(unet, contexts)
    spoil(unet, "attn2.to_k", "attn2.to_v")
    with torch.set_grad_enabled(grad):
        assert same_bits(call(unet)(latents, TIMESTEPS[STEPS], text), plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_remembered_times_are_those_of_the_rows(kind: str) -> None:
    unet = precise(make_unet(kind), kind)
    latents, contexts = inputs(unet)
    plain = call(unet)(latents, TIMESTEPS[STEPS], contexts)
    enable_reuse(unet)
    for rows in (ROWS, 2, 1):  # computed in one batch, in three with one row too many, in five
        times = RememberedTimes(unet, TIMESTEPS, latents[:rows])
        assert {len(table) for table in times.tables} == {len(TIMESTEPS)}
        remembered = call(unet)(latents, times.at(STEPS), contexts)
        assert distance(remembered, plain) < SUMMED_OTHERWISE[unet.dtype]
    assert distance(call(unet)(latents, times.at(STEPS.flip(0)), contexts), plain) > 1e-2
    spoil(unet, "time_embedding", "time_emb_proj")
    assert torch.equal(call(unet)(latents, times.at(STEPS), contexts), remembered)


@torch.no_grad()
def test_text_and_times_together_in_half_precision() -> None:
    """As far from float64 as bfloat16 is without, to a factor of 1.5: nothing remembered is rounded once more."""
    exact, unet = make_unet().to(torch.bfloat16).double(), make_unet("bfloat16")
    latents, contexts = inputs(unet)
    reference = call(exact)(latents.double(), TIMESTEPS[STEPS], contexts.double())
    plain = call(unet)(latents, TIMESTEPS[STEPS], contexts)
    enable_reuse(unet)
    text, times = RememberedText(unet, contexts), RememberedTimes(unet, TIMESTEPS, latents)
    assert {tensor.dtype for tensor in (*text.results, *times.tables)} == {torch.bfloat16}
    remembered = call(unet)(latents, times.at(STEPS), text)
    assert distance(remembered.double(), reference) < 1.5 * distance(plain.double(), reference)


@torch.no_grad()
def test_updates_fill_the_same_memory() -> None:
    """For the next chunk's contexts, and for other weights: where a CUDA graph would read them."""
    unet = make_unet().double()
    enable_reuse(unet)
    latents, contexts = inputs(unet)
    text, times = RememberedText(unet, contexts), RememberedTimes(unet, TIMESTEPS, latents)
    given = times.at(STEPS)
    addresses = [tensor.data_ptr() for tensor in (*text.results, *given.tables)]
    first = call(unet)(latents, given, text)
    _, others = inputs(unet, seed=2)
    text.update(others)
    second = call(unet)(latents, given, text)
    assert torch.equal(second, call(unet)(latents, given, others))
    assert distance(second, first) > 1e-2
    for parameter in unet.parameters():
        parameter *= 1.02
    text.update(contexts)
    times.update()
    third = call(unet)(latents, given, text)
    assert distance(third, call(unet)(latents, TIMESTEPS[STEPS], contexts)) < SUMMED_OTHERWISE[unet.dtype]
    assert distance(third, first) > 1e-2
    assert [tensor.data_ptr() for tensor in (*text.results, *given.tables)] == addresses


@torch.no_grad()
def test_text_does_not_follow_contexts_that_are_changed() -> None:
    """It is in the place of the contexts, so what it was made of may be overwritten; only `update` changes it."""
    unet = make_unet()
    enable_reuse(unet)
    latents, contexts = inputs(unet)
    text = RememberedText(unet, contexts)
    before = call(unet)(latents, TIMESTEPS[STEPS], text)
    contexts.zero_()
    assert torch.equal(call(unet)(latents, TIMESTEPS[STEPS], text), before)


def test_texts_of_another_kind_are_refused() -> None:
    unet = make_unet()
    with pytest.raises(ValueError, match="enable_reuse"):
        RememberedText(unet, inputs(unet)[1])
    with pytest.raises(ValueError, match="enable_reuse"):
        RememberedTimes(unet, TIMESTEPS, inputs(unet)[0])
    enable_reuse(unet)
    contexts = inputs(unet)[1]
    text = RememberedText(unet, contexts)
    before = [result.clone() for result in text.results]
    for wrong in (contexts[:-1], contexts[:, :-1], contexts.double(), contexts.to("meta")):
        with pytest.raises(ValueError, match=re.escape("accepted is [6, 5, 32] torch.float32 on cpu")):
            text.update(wrong)
    assert all(map(torch.equal, text.results, before))


@torch.no_grad()
def test_threads_share_a_unet_each_with_its_own_chunk() -> None:
    unet = make_unet("patched")
    enable_reuse(unet)
    chunks = [inputs(unet, seed) for seed in range(4)]
    times = RememberedTimes(unet, TIMESTEPS, chunks[0][0])

    def roll(index: int) -> Tensor:
        latents, contexts = chunks[index]
        text = RememberedText(unet, contexts)
        outputs = []
        for step in range(len(TIMESTEPS)):
            # One of them does without, at the same time.
            given = contexts if index == 3 else text
            latents = call(unet)(latents, times.at(torch.full((ROWS,), step)), given)
            outputs.append(latents)
        return torch.stack(outputs)

    workers = Workers(len(chunks))
    alone = [result for index in range(len(chunks)) for result in workers.map(roll, [index])]
    assert all(map(torch.equal, workers.map(roll, range(len(chunks))), alone))


def test_no_gradient_flows_through_what_is_remembered() -> None:
    unet = make_unet()
    enable_reuse(unet)
    latents, contexts = inputs(unet)
    contexts.requires_grad_()
    text, times = RememberedText(unet, contexts), RememberedTimes(unet, TIMESTEPS, latents)
    assert not any(tensor.requires_grad for tensor in (*text.results, *times.tables))
    call(unet)(latents, times.at(STEPS), text).sum().backward()
    without = {name for name, parameter in unet.named_parameters() if parameter.grad is None}
    assert without == {
        name for name, _ in unet.named_parameters() if re.search(r"attn2\.to_[kv]|time_emb_proj|time_embedding", name)
    }
    assert contexts.grad is None


@pytest.mark.parametrize("kind", ["plain", "lora", "scale_shift"])
def test_what_is_not_remembered_stays_as_it_was(kind: str) -> None:
    """Names, parameters, and bits and gradients with plain tensors; prepared twice, patched before or after, copied."""
    untouched, unet = make_unet(kind), make_unet(kind)
    names, parameters = list(unet.state_dict()), dict(unet.named_parameters())
    latents, contexts = inputs(unet)

    def run(unet: UNet2DConditionModel) -> list[Tensor]:
        output = call(unet)(latents, TIMESTEPS[STEPS], contexts)
        learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        return [output, *torch.autograd.grad(output.square().sum(), learned)]

    before = run(untouched)
    enable_reuse(unet)
    enable_reuse(unet)
    assert list(unet.state_dict()) == names
    assert all(parameters[name] is parameter for name, parameter in unet.named_parameters())
    assert all(map(torch.equal, run(unet), before))
    for model in (unet, untouched):
        patch_unet(model)
    assert all(map(torch.equal, run(unet), run(untouched)))
    copied = copy.deepcopy(unet)
    spoil(unet, "conv_in")
    assert all(map(torch.equal, run(copied), run(untouched)))
    text = RememberedText(copied, contexts)
    assert torch.equal(call(copied)(latents, TIMESTEPS[STEPS], text), run(untouched)[0])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_class_embeds": 3}, "class_embedding"),
        ({"time_embedding_act_fn": "silu"}, "time_embed_act"),
        ({"cross_attention_norm": "layer_norm"}, "norm_cross"),
        ({"encoder_hid_dim": 16}, "encoder_hid_proj"),
    ],
)
def test_other_conditions_are_refused(changes: dict, name: str) -> None:
    simple = {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")}
    blocks = SMALL | (simple if name == "norm_cross" else {})
    with pytest.raises(ValueError, match=f"{name}.*SD 1.x or 2.x"):
        enable_reuse(build_unet("sd1", **blocks, **changes))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["shared", "per_prompt", "independent"])
@pytest.mark.parametrize("samples", [range(12), range(2, 7), range(4, 8), range(11, 12)])
def test_distinct_rows_are_those_that_differ(kind: str, guidance: float, samples: range) -> None:
    """Against the rollout's own latents and contexts, compared number by number."""
    group_size, prompts = 4, 3
    start = initial_noise(1, prompts, group_size, (2, 2, 2), kind, torch.Generator().manual_seed(0))
    part = slice(samples.start, samples.stop)
    texts = torch.randn(prompts, 7).repeat_interleave(group_size, 0)[part]
    latents, contexts = start[part], texts
    if guidance != 1.0:
        latents, contexts = latents.repeat(2, 1, 1, 1), torch.cat([torch.zeros_like(texts), texts])
    rows = distinct_rows(kind, group_size, samples, guidance)
    joined = torch.cat([latents.flatten(1), contexts], 1)
    assert torch.equal(rows.expand(rows.select(joined)), joined)
    assert len(rows.chosen) == len(joined.unique(dim=0))
    assert rows.saved == len(joined) - len(rows.chosen)


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("kind", ["shared", "per_prompt", "independent"])
@torch.no_grad()
def test_the_first_step_from_its_distinct_rows(kind: str, remembered: bool) -> None:
    unet = make_unet("patched").to(memory_format=torch.channels_last)
    enable_reuse(unet)
    group_size, prompts = 3, 2
    start = initial_noise(1, prompts, group_size, (4, 8, 8), kind, torch.Generator().manual_seed(0))
    texts = torch.randn(prompts + 1, TOKENS, 32, generator=torch.Generator().manual_seed(1))
    latents = start.repeat(2, 1, 1, 1).to(memory_format=torch.channels_last)
    contexts = texts[torch.tensor([2, 2, 2, 2, 2, 2, 0, 0, 0, 1, 1, 1])]
    rows = distinct_rows(kind, group_size, range(6), 5.0)
    assert len(rows.chosen) == {"shared": 3, "per_prompt": 4, "independent": 12}[kind]
    computed = []

    def forward(*args) -> Tensor:
        computed.append(len(args[0]))
        return call(unet)(*args)

    first = torch.zeros(12, dtype=torch.int64)
    given = RememberedTimes(unet, TIMESTEPS, latents).at(first) if remembered else TIMESTEPS[first]
    output = forward_distinct(forward, rows, latents, given, contexts)
    assert computed == [len(rows.chosen)]
    whole = call(unet)(latents, TIMESTEPS[first], contexts)
    assert distance(output, whole) < SUMMED_OTHERWISE[unet.dtype]
    assert output.stride() == whole.stride()


def test_same_bits() -> None:
    one = torch.randn(2, 3, 4, 4)
    assert same_bits(one, one.clone())
    assert not same_bits(one, one.nextafter(one.new_tensor(9.0)))
    assert not same_bits(one, one.to(memory_format=torch.channels_last))  # later sums may run in another order
    assert not same_bits(one, one * torch.nan)


SHARED = distinct_rows("shared", 3, range(3), 5.0)
NOTHING_SHARED = distinct_rows("independent", 3, range(3), 5.0)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("rows", [SHARED, NOTHING_SHARED])
@torch.no_grad()
def test_auto_keeps_what_leaves_the_bits_alone(text: bool, times: bool, rows: DistinctRows) -> None:
    """Where text or times are not to be kept, this forward pass is off by a bit of one number when it is given them.

    So is a first step whose rows are fewer, always.
    """
    unet = make_unet()
    enable_reuse(unet)
    latents, contexts = inputs(unet)
    seen, memory = [], torch.empty_like(latents)  # where every output is, as with a CUDA graph

    def forward(latents: Tensor, timesteps: Tensor | TimesOfRows, contexts: Tensor | RememberedText) -> Tensor:
        given = (isinstance(contexts, RememberedText), isinstance(timesteps, TimesOfRows))
        seen.append((len(latents), *given))
        # What the UNet says, but from the tables themselves: this test is not about their bits.
        steps = timesteps.steps if given[1] else (timesteps[:, None] == TIMESTEPS).int().argmax(1)
        output = memory[: len(latents)]
        output.copy_(latents + steps.view(-1, 1, 1, 1) + (contexts.results[0] if given[0] else base(contexts)).mean())
        if (given[0] and not text) or (given[1] and not times) or len(latents) < ROWS:
            output[0, 0, 0, 0] = output[0, 0, 0, 0].nextafter(output.new_tensor(9e9))
        return output

    base = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    chosen = choose_reuse(forward, unet, TIMESTEPS, latents, contexts, rows)
    assert chosen == Reuse(text=text, times=times, first=False)
    assert (ROWS, text, True) in seen  # times are tried with what was kept before
    assert any(count < ROWS for count, *_ in seen) == (rows.saved > 0)


@torch.no_grad()
def test_auto_with_a_unet() -> None:
    """Texts are kept, being computed at the same shapes; everything is where no row's bits depend on the others."""
    unet = make_unet()
    enable_reuse(unet)
    latents, contexts = inputs(unet)
    chosen = choose_reuse(call(unet), unet, TIMESTEPS, latents, contexts, NOTHING_SHARED)
    assert chosen.text
    assert not chosen.first

    def forward(latents: Tensor, *_) -> Tensor:
        return latents * 3

    assert choose_reuse(forward, unet, TIMESTEPS, latents, contexts, SHARED) == Reuse(True, True, True)


@pytest.mark.slow
def test_one_graph_serves_all_chunks_and_steps() -> None:
    """torch.compile traces the middle block, with text and times, once and whole.

    New contexts and steps are new numbers in the same memory. The whole UNet would take half a minute to trace.
    """
    unet = make_unet()
    enable_reuse(unet)
    latents, contexts = inputs(unet)
    text, times = RememberedText(unet, contexts), RememberedTimes(unet, TIMESTEPS, latents)
    steps = STEPS.clone()
    traced = []

    def backend(graph, _):
        traced.append(graph)
        return graph.forward

    def block(hidden: Tensor, given: TimesOfRows, text: RememberedText) -> Tensor:
        return unet.mid_block(hidden, unet.time_embedding(unet.get_time_embed(hidden, given)), text)

    hidden = torch.randn(ROWS, 64, 2, 2, generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        outputs = []
        for seed in (1, 2):
            text.update(inputs(unet, seed)[1])
            steps.copy_(STEPS.roll(seed))
            outputs.append(compiled(hidden, times.at(steps), text))
            assert torch.equal(outputs[-1], block(hidden, times.at(steps), text))
    assert not torch.equal(*outputs)
    assert len(traced) == 1


@pytest.mark.slow
def test_the_savings_that_the_docstring_states() -> None:
    """From the layers' sizes alone, and that the UNet of SD 1.x on the meta device computes just so much less."""
    rows, steps, tokens, width = 128, 50, 77, 768
    attended = 320 * 5 + 640 * 5 + 1280 * 6  # channels of its 16 transformers
    text = 2 * rows * tokens * width * 2 * attended
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(REAL / "sd1" / "unet"))
        enable_reuse(unet)
        # One row of the 128: all cost the same.
        latents, contexts = torch.empty(1, 4, 64, 64), torch.empty(1, tokens, width)
        timesteps = torch.empty(1, dtype=torch.int64)

        def flops(*given) -> int:
            with FlopCounterMode(display=False) as counter:
                unet(latents, *given)
            return counter.get_total_flops() * rows

        remembered, times = RememberedText(unet, contexts), RememberedTimes(unet, timesteps, latents)
        embedded = 2 * rows * (320 * 1280 + 1280 * 1280 + 1280 * sum(table.shape[1] for table in times.tables))
        forward = flops(timesteps, contexts)
        assert flops(times.at(timesteps), remembered) == forward - text - embedded
    assert sum(result.nbytes for result in remembered.results) * rows // 2 == 492_011_520  # bfloat16: half of float32's
    whole = forward * steps / 1e12
    shared = forward / rows * distinct_rows("shared", 16, range(64), 5.0).saved / 1e12
    grouped = forward / rows * distinct_rows("per_prompt", 16, range(64), 5.0).saved / 1e12
    saved = {"text": text * (steps - 1) / 1e12, "times": embedded * (steps - 1) / 1e12}
    document = " ".join(reuse.__doc__.split())
    for line in (
        f"{whole:,.0f} TFLOP of the UNet",
        f"text {saved['text']:.1f} {100 * saved['text'] / whole:.2f} %",
        f"times {saved['times']:.2f} {100 * saved['times'] / whole:.3f} %",
        f"first {shared:.1f} {100 * shared / whole:.2f} %",
        f"{grouped:.1f} ({100 * grouped / whole:.2f} %)",
    ):
        assert line in document


@torch.no_grad()
def test_texts_and_times_need_not_be_tried() -> None:
    """Where each way of calling the UNet is compiled by itself."""
    unet = make_unet()
    enable_reuse(unet)
    latents, contexts = inputs(unet)

    def forward(latents: Tensor, timesteps: Tensor, contexts: Tensor) -> Tensor:
        assert isinstance(timesteps, Tensor)
        assert isinstance(contexts, Tensor)
        return latents * 3

    arguments = (forward, unet, TIMESTEPS, latents, contexts)
    assert choose_reuse(*arguments, SHARED, remember=False) == Reuse(first=True)
    assert choose_reuse(*arguments, NOTHING_SHARED, remember=False) == Reuse()
