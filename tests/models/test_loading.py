"""Files and configs as published: believed where they say what they are, refused by name where they do not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken, CLIPTokenizer

from fastgrpo import evaluate
from fastgrpo.models.check import describe
from fastgrpo.models.configs import Components
from fastgrpo.models.load import load_components
from fastgrpo.models.save import save_pipeline
from fastgrpo.models.tokenizer import build_tokenizer
from fastgrpo.policy import load_policy
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.command_line import parse_flags
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError
from support import sd_pipelines
from support.models import NOT_WEIGHTS, assert_equal, bundled, change, original_shapes, refusal, write_header
from support.sd_pipelines import KINDS

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(pipelines, folders, tmp_path_factory):
    """Kind -> a config that names its single file."""
    root = tmp_path_factory.mktemp("files")
    return {
        kind: ModelConfig(
            path=str(sd_pipelines.save_single_file(pipelines[kind], root / f"{kind}.safetensors")),
            config=str(folders[kind]),
        )
        for kind in KINDS
    }


def refused(model):
    """The sentence with which loading refuses."""
    with pytest.raises(ConfigError) as caught:
        load_components(model, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# What a single file says of itself.

V512 = {"modelspec.prediction_type": "v", "modelspec.resolution": "512x512"}


@pytest.mark.parametrize(
    ("kind", "metadata", "extra", "prediction", "size", "zero_snr"),
    [
        ("sd2", {"modelspec.prediction_type": "epsilon"}, (), "epsilon", 64, False),
        ("sd2", {"modelspec.prediction_type": "v"}, (), "v_prediction", 96, False),
        ("sd2", V512, (), "v_prediction", 64, False),
        (
            "sd2",
            {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "640x448"},
            (),
            "epsilon",
            (56, 80),
            False,
        ),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), "epsilon", 64, False),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction", 96, False),
        ("sd2", {}, ("v_pred",), "v_prediction", 96, False),
        ("sd2", {}, ("v_pred", "ztsnr"), "v_prediction", 96, True),
        ("sd1", {}, ("v_pred", "ztsnr"), "v_prediction", 64, True),
        ("sd1", {"modelspec.prediction_type": "v"}, (), "v_prediction", 64, False),
        ("sd1", {"modelspec.resolution": "768x768"}, (), "epsilon", 96, False),
        ("sd1", {"modelspec.resolution": "any"}, (), "epsilon", 64, False),
    ],
)
def test_a_single_file_is_what_it_says(kind, metadata, extra, prediction, size, zero_snr, tmp_path):
    shapes = original_shapes(bundled(kind)) | dict.fromkeys(extra, (0,))
    path = write_header(tmp_path / "model.safetensors", shapes, metadata)
    description = describe(ModelConfig(path=str(path)))
    found = description.unet["sample_size"]
    assert (found if isinstance(found, int) else tuple(found)) == size
    assert description.scheduler["prediction_type"] == prediction
    assert description.scheduler.get("rescale_betas_zero_snr", False) == zero_snr
    schedule = make_schedule(description.scheduler, 10, 1.0, CPU)
    # What was trained to begin with nothing but noise has to begin there.
    assert (schedule.timesteps[0] == 999) == zero_snr
    said = [*metadata, *extra]
    assert all(name in " ".join(description.notes) for name in said) or metadata == {"modelspec.resolution": "any"}
    overruled = describe(ModelConfig(path=str(path), prediction_type="v_prediction"))
    assert overruled.scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("step", "prediction", "size"), [(875_000, "epsilon", 64), (110_000, "v_prediction", 96), (7, None, None)]
)
def test_a_torch_file_of_sd2_is_known_by_its_steps(step, prediction, size, tmp_path):
    path = tmp_path / "model.ckpt"
    one = torch.zeros(1, dtype=torch.float16)  # seen as tensors of any shape, so that the file is small
    state = {key: one.expand(shape) for key, shape in original_shapes(bundled("sd2")).items()}
    torch.save({"global_step": step, "state_dict": state}, path)
    if prediction is None:
        assert "does not say what its UNet predicts" in refusal(path=str(path))
        return
    description = describe(ModelConfig(path=str(path)))
    assert description.scheduler["prediction_type"] == prediction
    assert description.unet["sample_size"] == size


def test_contradictions_are_asked_about(files, folders, tmp_path):
    """The small file of sd1 predicts epsilon by its configs."""
    path = tmp_path / "v.safetensors"
    save_file(load_file(files["sd1"].path), path, metadata={"modelspec.prediction_type": "v"})
    model = replace(files["sd1"], path=str(path))
    message = refusal(path=model.path, config=model.config)
    assert "predicts v_prediction by its modelspec.prediction_type, and epsilon by model.config" in message
    for told in ("epsilon", "v_prediction"):
        assert describe(replace(model, prediction_type=told)).scheduler["prediction_type"] == told

    shapes = original_shapes(bundled("sd2"))
    two = {"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"}
    write_header(path, shapes, two)
    assert "predicts epsilon by its modelspec.prediction_type and v_prediction" in refusal(path=str(path))
    write_header(path, shapes, {"modelspec.prediction_type": "flow"})
    assert "modelspec.prediction_type is 'flow'" in refusal(path=str(path))
    write_header(path, shapes, {"modelspec.prediction_type": "v", "modelspec.resolution": "500x500"})
    assert "its images are 500 x 500 pixels; multiples of 8" in refusal(path=str(path))
    write_header(path, shapes | {"ztsnr": (0,)})
    assert "zero terminal SNR" in refusal(path=str(path), prediction_type="epsilon")

    unet = load_file(folders["sd1"] / UNET) | {"v_pred": torch.zeros(0)}
    save_file(unet, path)
    message = refusal(path=str(folders["sd1"]), unet=str(path))
    assert "predicts v_prediction by its v_pred, and the pipeline epsilon" in message


def test_evaluate_knows_every_setting_of_a_model():
    flags = {"unet": "u", "config": "c", "variant": "fp16", "revision": "r", "prediction_type": "v_prediction"}
    arguments = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = parse_flags(evaluate.Evaluate, ["--model", "m", *arguments], evaluate.PROGRAM)
    assert evaluate._config(command).model == ModelConfig(path="m", **flags)


# ---------------------------------------------------------------------------------------------------------------------
# More, or less, than a plain UNet.

MORE = {
    "label_emb.0.0.weight": "SD 2.1 unCLIP",
    "time_embed.cond_proj.weight": "a consistency model (LCM)",
    "position_net.linears.0.weight": "GLIGEN",
    "input_blocks.1.1.transformer_blocks.0.fuser.norm1.weight": "GLIGEN",
    "input_blocks.1.0.time_stack.in_layers.0.weight": "videos",
    "something.new": "more than a plain SD 1.x / 2.x has",
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", MORE)
def test_what_a_plain_unet_does_not_have_is_refused_by_name(extra, files, folders, copy, tmp_path):
    path = tmp_path / "more.safetensors"
    more = {f"model.diffusion_model.{extra}": torch.zeros(2)}
    save_file(load_file(files["sd1"].path) | more, path)
    message = refusal(path=str(path), config=files["sd1"].config)
    assert f"model.diffusion_model.{extra}" in message
    assert MORE[extra] in message

    save_file(load_file(copy / UNET) | {extra: torch.zeros(2)}, copy / UNET)
    for model in ({"path": str(copy)}, {"path": str(folders["sd1"]), "unet": str(copy / "unet")}):
        message = refusal(**model)
        assert extra in message
        assert MORE[extra] in message
    assert extra in refusal(path=str(folders["sd1"]), unet=str(copy / UNET))


def test_other_parts_that_a_single_file_has_besides_are_refused(files, tmp_path):
    path = tmp_path / "more.safetensors"
    layer = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.bias"
    for extra, why in [
        ("motion_modules.0.temporal_transformer.norm.weight", "AnimateDiff"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        (layer, layer),
        ("first_stage_model.encoder.quant.weight", "first_stage_model.encoder.quant.weight"),
    ]:
        save_file(load_file(files["sd1"].path) | {extra: torch.zeros(2)}, path)
        assert why in refusal(path=str(path), config=files["sd1"].config)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_frozen_components_are_neither_more_nor_less(component, copy):
    (file,) = (copy / component).glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert "extra.weight" in refused(ModelConfig(path=str(copy)))
    first = next(name for name in tensors if name.endswith("weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file, metadata={"format": "pt"})
    assert first.removeprefix("text_model.") in refused(ModelConfig(path=str(copy)))


# ---------------------------------------------------------------------------------------------------------------------
# model.unet as a file.


def original(kind, tensors, root):
    """A UNet's tensors as the original layout names them."""
    pipeline = sd_pipelines.build_pipeline(kind)
    pipeline.unet.load_state_dict(tensors)
    whole = load_file(sd_pipelines.save_single_file(pipeline, root / "whole.safetensors"))
    return {key: tensor for key, tensor in whole.items() if key.startswith("model.diffusion_model.")}, whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_unet_comes_from_a_file_in_either_layout(kind, folders, tmp_path):
    other = sd_pipelines.build_pipeline(kind, seed=1).unet
    state = other.state_dict()
    layout, whole = original(kind, state, tmp_path)
    bare = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in layout.items()}
    for name, content in {
        "diffusers.safetensors": state,
        "prefixed.safetensors": {f"unet.{key}": tensor for key, tensor in state.items()},
        "diffusers.pt": state,
        "nested.bin": {"unet": state},
        "original.safetensors": layout,
        "bare.pth": bare,
        "whole.ckpt": {"global_step": 7, "state_dict": whole},
    }.items():
        path = tmp_path / name
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
        model = ModelConfig(path=str(folders[kind]), unet=str(path))
        assert describe(model).notes == ()
        assert_equal(load_components(model, torch.float32).unet, other)


@pytest.mark.slow
def test_a_partial_unet_is_laid_over_the_pipelines(files, folders, pipelines, tmp_path):
    """As ESD's newer files and UCE's: only the cross-attention that was tuned, here in half precision."""
    base, other = (sd_pipelines.build_pipeline("sd1", seed=seed).unet.state_dict() for seed in (0, 1))
    tuned = {name: tensor.half() for name, tensor in other.items() if ".attn2.to_k." in name or ".attn2.to_v." in name}
    layout, _ = original("sd1", other, tmp_path)
    renamed = {key: tensor for key, tensor in layout.items() if ".attn2.to_k." in key or ".attn2.to_v." in key}
    assert len(tuned) == len(renamed) == 32
    for name, content in {"esd.safetensors": tuned, "original.safetensors": renamed}.items():
        save_file(content, tmp_path / name)
        for model in (ModelConfig(path=str(folders["sd1"])), files["sd1"]):
            model = replace(model, unet=str(tmp_path / name))
            (note,) = describe(model).notes
            assert f"32 of the UNet's {len(base)} tensors are {model.unet}'s, the others {model.path}'s" in note
            found = load_components(model, torch.float32).unet.state_dict()
            for key, tensor in found.items():
                expected = base if key not in tuned else other if name.startswith("original") else tuned
                assert torch.equal(tensor, expected[key].float()), key


def test_files_that_are_no_unet_of_this_pipeline_are_refused(folders, tmp_path):
    path, folder = tmp_path / "unet.safetensors", str(folders["sd1"])
    assert "there is no such file" in refusal(path=folder, unet=str(path))
    for tensors, reason in [
        ({"mid_block.attentions.0.norm.weight": torch.zeros(2)}, "norm.weight is [2], and [64] in the pipeline"),
        ({"unet.down_blocks.0.attentions.0.lora_A.weight": torch.zeros(2)}, "adapters (LoRA)"),
        ({"decoder.conv_in.weight": torch.zeros(2)}, "decoder.conv_in.weight"),
        ({"first_stage_model.decoder.conv_in.weight": torch.zeros(2)}, "there is no tensor of a UNet"),
    ]:
        save_file(tensors, path)
        assert reason in refusal(path=folder, unet=str(path))
    path = tmp_path / "unet.npz"
    path.write_bytes(b"PK")
    assert ".safetensors, .ckpt, .pt, .pth, .bin is accepted" in refusal(path=folder, unet=str(path))


# ---------------------------------------------------------------------------------------------------------------------
# What is no file of weights.


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_that_is_no_weights_is_named_for_what_it_is(suffix, folders, copy, tmp_path):
    path = tmp_path / f"file{suffix}"
    for content, what in NOT_WEIGHTS.items():
        path.write_bytes(content)
        assert what in refusal(path=str(path))
        assert what in refusal(path=str(folders["sd1"]), unet=str(path))
        (copy / UNET).write_bytes(content)
        message = refusal(path=str(copy))
        assert what in message
        assert UNET in message


def test_a_suffix_that_is_not_the_contents_is_told(files, folders, tmp_path):
    as_torch, as_safe, old = (tmp_path / name for name in ("a.ckpt", "b.safetensors", "c.safetensors"))
    shutil.copy(files["sd1"].path, as_torch)
    torch.save({}, as_safe)
    torch.save({}, old, _use_new_zipfile_serialization=False)
    assert "a safetensors file under another name; name it a.safetensors" in refusal(path=str(as_torch))
    for path in (as_safe, old):
        assert "a torch file (a pickle) under the name of safetensors" in refusal(path=str(path))
        assert "a torch file (a pickle)" in refusal(path=str(folders["sd1"]), unet=str(path))


def test_a_variant_that_is_not_there_is_told(files, copy):
    assert "model.variant is 'fp16', which" in refusal(path=str(copy), variant="fp16")
    message = refusal(path=files["sd1"].path, config=files["sd1"].config, variant="fp16")
    assert "model.variant is 'fp16', but model.path is a file" in message
    for component in ("unet", "vae", "text_encoder"):
        (file,) = (copy / component).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    assert "has only the variant fp16 of its unet; model.variant fp16 is accepted" in refusal(path=str(copy))
    load_components(ModelConfig(path=str(copy), variant="fp16"), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite.


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused(component, value, files, folders, copy, tmp_path):
    (file,) = (copy / component).glob("*.safetensors")
    tensors = load_file(file)
    name = list(tensors)[len(tensors) // 2]
    tensors[name].flatten()[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    bare = name.removeprefix("text_model.")
    message = refused(ModelConfig(path=str(copy)))
    assert f"whose {component} has numbers that are not finite in {bare} (float32)" in message
    if component == "unet":
        message = refused(ModelConfig(path=str(folders["sd1"]), unet=str(file)))
        assert message.startswith(f"model.unet is {str(file)!r}, whose unet has numbers that are not finite in {name}")
        single = load_file(files["sd1"].path)
        single["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = value
        save_file(single, tmp_path / "single.safetensors")
        message = refused(replace(files["sd1"], path=str(tmp_path / "single.safetensors")))
        assert "whose unet has numbers that are not finite in conv_out.weight" in message


def test_weights_that_a_precision_cannot_hold_are_refused(copy):
    (file,) = (copy / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"][0, 0, 0, 0] = 70000.0  # float16 ends at 65,504
    save_file(tensors, file, metadata={"format": "pt"})
    load_components(ModelConfig(path=str(copy)), torch.bfloat16)
    with pytest.raises(ConfigError, match=r"vae has numbers .* in decoder\.conv_in\.weight \(float16\)"):
        load_components(ModelConfig(path=str(copy)), torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers.

HARD = [
    "",
    "!",
    "wow! a cat!!! !a b! ?! !?",
    "¡hola! “quotes” it's 100% #1 @home",
    "naïve café Ünïcödé 日本語 🙂 fin!",
    "  MANY   spaces\tand\nlines!  ",
    "<|startoftext|> a <|endoftext|> b!",
    "supercalifragilisticexpialidocious! " * 30,
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_tokenizer_gives_the_same_ids(kind, pipelines, tmp_path):
    """However it is read: from tokenizer.json, or by programs that know vocab.json and merges.txt alone."""
    built = build_tokenizer({"sd1": "<|endoftext|>", "sd2": "!"}[kind])
    pipeline = pipelines[kind]
    scheduler = dict(pipeline.scheduler.config)
    components = Components(pipeline.unet, pipeline.vae, pipeline.text_encoder, built, scheduler)
    save_pipeline(tmp_path / "out", components, torch.float32)
    folder = tmp_path / "out" / "tokenizer"
    # As the hub has SD 1.x's and 2.x's: the special tokens in a file of their own.
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, hub)
    (hub / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (hub / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": built.pad_token}))
    expected = built(HARD, padding="max_length", truncation=True).input_ids
    for read in (folder, hub):
        again = CLIPTokenizer.from_pretrained(read)
        assert again(HARD, padding="max_length", max_length=77, truncation=True).input_ids == expected


def test_a_tokenizer_is_as_long_as_it_and_the_text_encoder_take(copy):
    config = "tokenizer/tokenizer_config.json"
    change(copy, config, model_max_length=None)
    tokenizer = load_components(ModelConfig(path=str(copy)), torch.float32).tokenizer
    assert tokenizer.model_max_length == 77
    policy = load_policy(ModelConfig(path=str(copy)), CPU, torch.float32)
    assert policy.encode(["a " * 200]).shape == (1, 77, 32)
    for tokens, positions in ((20, 77), (77, 20)):
        change(copy, config, model_max_length=tokens)
        change(copy, "text_encoder/config.json", max_position_embeddings=positions)
        (file,) = (copy / "text_encoder").glob("*.safetensors")
        tensors = load_file(file)
        tensors["text_model.embeddings.position_embedding.weight"] = torch.randn(positions, 32)
        tensors.pop("text_model.embeddings.position_ids", None)
        save_file(tensors, file, metadata={"format": "pt"})
        assert load_components(ModelConfig(path=str(copy)), torch.float32).tokenizer.model_max_length == 20


def test_a_token_without_an_embedding_is_refused(copy):
    tokenizer = CLIPTokenizer.from_pretrained(copy / "tokenizer")
    tokenizer.add_tokens([AddedToken("<cat-toy>")])
    tokenizer.save_pretrained(copy / "tokenizer")
    message = refused(ModelConfig(path=str(copy)))
    assert (
        "the token '<cat-toy>' with the number 1500, and whose text encoder has embeddings for 1500 tokens" in message
    )
