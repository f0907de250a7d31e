"""Pipelines in every published form load to the same model; what is no SD 1.x / 2.x is refused with the reason."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgrpo.models.check import SHAPES_PIPELINE, describe
from fastgrpo.models.load import load_components
from fastgrpo.models.save import save_pipeline
from fastgrpo.models.single_file import places, read_single_file
from fastgrpo.models.tokenizer import build_tokenizer
from fastgrpo.policy import load_policy
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError
from support import sd_pipelines
from support.models import PARTS, assert_equal, bundled, original_shapes, refusal, write_header
from support.plain_policy import predict
from support.sd_pipelines import KINDS, REVISION

CPU = torch.device("cpu")
TEXTS = ["a photo of a red cube", "two dogs"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The hub's client without a network, with an empty cache; returned for tests that fill it."""
    cache = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="module")
def models(pipelines, folders, offline, tmp_path_factory):
    """(kind, form) -> a config that names the kind's pipeline in that form."""
    root = tmp_path_factory.mktemp("forms")
    found = {}
    for kind, pipeline in pipelines.items():
        folder = str(folders[kind])
        sd_pipelines.save_in_hub_cache(folders[kind], offline, f"someone/{kind}")
        plain = sd_pipelines.save_single_file(pipeline, root / f"{kind}.safetensors")
        found[kind, "folder"] = ModelConfig(path=folder)
        found[kind, "hub"] = ModelConfig(path=f"someone/{kind}")
        found[kind, "revision"] = ModelConfig(path=f"someone/{kind}", revision=REVISION)
        found[kind, "safetensors"] = ModelConfig(path=str(plain), config=folder)
        found[kind, "ckpt"] = ModelConfig(path=str(root / f"{kind}.ckpt"), config=f"someone/{kind}")
        torch.save({"global_step": 7, "state_dict": load_file(plain)}, root / f"{kind}.ckpt")
        other = sd_pipelines.save_folder(sd_pipelines.build_pipeline(kind, seed=1), root / f"{kind}-other-unet")
        unet = root / f"{kind}-unet"
        shutil.copytree(folders[kind] / "unet", unet)
        (unet / "config.json").unlink()
        found[kind, "unet"] = ModelConfig(path=str(other), unet=f"{root}:{kind}-unet")
        # The VAE and text encoder of the other one are exchanged too, so that its UNet alone differs.
        for part in ("vae", "text_encoder"):
            shutil.rmtree(other / part)
            shutil.copytree(folders[kind] / part, other / part)
    return found


FORMS = [("sd1", form) for form in ("folder", "hub", "revision", "safetensors", "ckpt", "unet")]
FORMS += [("sd2", form) for form in ("folder", "hub", "safetensors", "unet")]


@pytest.fixture(scope="module")
def policies(models):
    """(kind, form) -> the policy loaded from it."""
    return {key: load_policy(models[key], CPU, torch.float32) for key in FORMS}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_every_form_has_the_pipelines_weights(kind, form, policies, pipelines):
    policy = policies[kind, form]
    for part in PARTS:
        assert_equal(getattr(policy, part), getattr(pipelines[kind], part))
        assert not any(tensor.is_meta for tensor in getattr(policy, part).buffers())
    assert policy.scheduler_config["_class_name"] == type(pipelines[kind].scheduler).__name__
    assert policy.scheduler_config["prediction_type"] == ("epsilon" if kind == "sd1" else "v_prediction")


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_draws_the_same_picture(kind, policies):
    pictures = []
    for policy in (policy for key, policy in policies.items() if key[0] == kind):
        schedule = make_schedule(policy.scheduler_config, 2, 1.0, CPU)
        pictures.append(draw_images(policy, policy.encode(TEXTS), schedule, 3.0, [1, 2]))
    assert pictures[0].shape == (2, 3, 64, 64)
    assert pictures[0].std() > 0.01  # not all one colour
    for picture in pictures[1:]:
        assert torch.equal(picture, pictures[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_predicts_what_diffusers_pipeline_does(kind, policies, folders):
    policy = policies[kind, "folder"]
    pipeline = StableDiffusionPipeline.from_pretrained(folders[kind])
    embeds, empty = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
    assert torch.equal(policy.encode(TEXTS), embeds)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([981, 1])
    # The layout and batch that the policy uses, so that the two are equal to the last bit.
    pipeline.unet.to(memory_format=torch.channels_last)
    with torch.no_grad():
        output = pipeline.unet(torch.cat([latents] * 2), timesteps.repeat(2), torch.cat([empty, embeds])).sample
        uncond, cond = output.chunk(2)
        assert torch.equal(predict(policy, latents, timesteps, embeds, 5.0), uncond + 5.0 * (cond - uncond))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_it_and_returns_float32(dtype, models, policies):
    pair = policies["sd1", "folder"], load_policy(models["sd1", "safetensors"], CPU, dtype)
    assert all(parameter.dtype == torch.float32 for parameter in pair[1].unet.parameters())
    assert {pair[1].vae.dtype, pair[1].text_encoder.dtype} == {dtype}
    pair, seen = (pair[0], pair[1].rounded()), []
    pair[1].network.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    latents = torch.randn(1, *pair[0].latent_shape, generator=torch.Generator().manual_seed(0))
    embeds = pair[0].encode(TEXTS[:1])
    with torch.no_grad():
        full, half = (predict(policy, latents, torch.tensor([500]), embeds, 1.0) for policy in pair)
    assert seen == [dtype]
    assert half.dtype == torch.float32
    # 60 layers deep, each rounding to eps, errors adding like a random walk: sqrt(60) eps, times 4 for the worst
    # element.
    worst = 4 * 60**0.5 * torch.finfo(dtype).eps * full.abs().max().item()
    assert 0 < (half - full).abs().max() < worst


# ---------------------------------------------------------------------------------------------------------------------
# The original single-file layout.


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_are_read_as_diffusers_reads_them(kind, models, policies, folders):
    """diffusers' reader is a second implementation.

    It looks for SD 1.x by position_ids, and drops OpenCLIP's layer 24.
    """
    theirs = StableDiffusionPipeline.from_single_file(
        models[kind, "safetensors"].path, config=str(folders[kind]), local_files_only=True
    )
    for part in PARTS:
        assert_equal(getattr(policies[kind, "safetensors"], part), getattr(theirs, part))


def test_what_a_published_sd2_file_has_besides_is_left_out(models, pipelines, tmp_path):
    """The last layer of the text encoder, its projection, and the average of the UNet's weights."""
    tensors = load_file(models["sd2", "safetensors"].path)
    prefix = "cond_stage_model.model."
    last = {
        key.replace("resblocks.22", "resblocks.23"): torch.zeros_like(value)
        for key, value in tensors.items()
        if "resblocks.22" in key
    }
    average = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(32, 4, 3, 3),
        "alphas_cumprod": torch.ones(9),
    }
    extra = {prefix + "text_projection": torch.eye(48), prefix + "logit_scale": torch.tensor(4.6)}
    save_file(tensors | last | average | extra, tmp_path / "published.safetensors")
    model = replace(models["sd2", "safetensors"], path=str(tmp_path / "published.safetensors"))
    components = load_components(model, torch.float32)
    for part in PARTS:
        assert_equal(getattr(components, part), getattr(pipelines["sd2"], part))


def test_older_spellings_of_single_files_are_read(models, pipelines, tmp_path):
    """Text encoder without `text_model.`, the VAE's projections as matrices."""
    tensors = {}
    for key, value in load_file(models["sd1", "safetensors"].path).items():
        projection = "first_stage_model" in key and ".attn_1." in key and value.ndim == 4
        tensors[key.replace("text_model.", "")] = value[..., 0, 0].contiguous() if projection else value
    save_file(tensors, tmp_path / "old.safetensors")
    model = replace(models["sd1", "safetensors"], path=str(tmp_path / "old.safetensors"))
    components = load_components(model, torch.float32)
    for part in PARTS:
        assert_equal(getattr(components, part), getattr(pipelines["sd1"], part))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_in_half_precision_holds_the_rounded_weights(kind, pipelines, tmp_path):
    pipeline = pipelines[kind]
    path = sd_pipelines.save_single_file(pipeline, tmp_path / "half.safetensors", torch.float16)
    states = read_single_file(path, pipeline.unet, pipeline.vae, pipeline.text_encoder)
    for part in PARTS:
        expected = getattr(pipeline, part).state_dict()
        assert states[part].keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name].half()) for name, tensor in states[part].items())


# Sizes as published; names as in v1-5-pruned-emaonly.safetensors and v2-1_768-ema-pruned.safetensors.
FULL_SIZE = {
    "sd1": (859_520_964, 83_653_863, 123_060_480),
    "sd2": (865_910_724, 83_653_863, 340_387_840),
}


UNET_KEYS = {
    "time_embed.0.weight": (1280, 320),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.bias": (10240,),
    "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "middle_block.1.norm.weight": (1280,),
    "middle_block.2.emb_layers.1.weight": (1280, 1280),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.8.2.conv.bias": (640,),
    "output_blocks.11.0.in_layers.0.weight": (640,),
    "output_blocks.11.1.proj_out.bias": (320,),
    "out.2.weight": (4, 320, 3, 3),
}


VAE_KEYS = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "decoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
    "decoder.up.0.block.2.norm2.weight": (128,),
    "decoder.up.3.block.0.norm1.weight": (512,),
    "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
    "decoder.norm_out.weight": (128,),
    "post_quant_conv.weight": (4, 4, 1, 1),
}


TEXT_KEYS = {
    "sd1": {
        "transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        "transformer.text_model.final_layer_norm.bias": (768,),
    },
    "sd2": {
        "model.positional_embedding": (77, 1024),
        "model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        "model.transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
        "model.ln_final.weight": (1024,),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_bundled_configs_and_names_are_those_of_the_published_models(kind):
    components = bundled(kind)
    assert tuple(sum(p.numel() for p in components[part].parameters()) for part in PARTS) == FULL_SIZE[kind]
    shapes = original_shapes(components)
    known = {f"model.diffusion_model.{key}": shape for key, shape in UNET_KEYS.items()}
    known |= {f"first_stage_model.{key}": shape for key, shape in VAE_KEYS.items()}
    known |= {f"cond_stage_model.{key}": shape for key, shape in TEXT_KEYS[kind].items()}
    for key, shape in known.items():
        assert shapes.get(key) == shape, key
    # One place for one tensor, three for the fused ones.
    for part, names in places(**components).items():
        assert names.keys() == components[part].state_dict().keys()
        slots = [(place.key, place.third) for place in names.values()]
        assert len(set(slots)) == len(slots)
        fused = {place.key for place in names.values() if place.third is not None}
        assert len(fused) == (2 * 23 if (kind, part) == ("sd2", "text_encoder") else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_size_single_file_is_recognised_without_reading_its_weights(kind, tmp_path):
    path = write_header(tmp_path / "model.safetensors", original_shapes(bundled(kind)))
    assert path.stat().st_size > 2e9
    for prediction, sizes in (("epsilon", (64, 64)), ("v_prediction", (64, 96))):
        told = describe(ModelConfig(path=str(path), prediction_type=prediction))
        assert told.unet["cross_attention_dim"] == {"sd1": 768, "sd2": 1024}[kind]
        assert make_schedule(told.scheduler, 50, 1.0, CPU).prediction_type == prediction
        assert told.unet["sample_size"] == sizes[kind == "sd2"]
    if kind == "sd1":
        assert describe(ModelConfig(path=str(path))).scheduler["prediction_type"] == "epsilon"
    else:
        message = refusal(path=str(path))
        assert "a file of SD 2.x that does not say what its UNet predicts; model.prediction_type" in message
        assert "evaluate: --prediction-type" in message


def test_prediction_type_overrules_the_schedulers(folders):
    for kind in ("epsilon", "v_prediction"):
        components = load_components(ModelConfig(path=str(folders["sd1"]), prediction_type=kind), torch.float32)
        assert make_schedule(components.scheduler_config, 4, 1.0, CPU).prediction_type == kind


# ---------------------------------------------------------------------------------------------------------------------
# CLIP's tokenizer.
SENTENCES = [
    "",
    "a photo of a cat",
    "Hello, world!! It's 2024; don't PANIC...",
    "naïve café, Ünïcödé — “quotes” 日本語 and 🙂",
    "  Many   spaces\tand\nlines ",
    "supercalifragilisticexpialidocious " * 30,
]


@pytest.mark.parametrize(("pad", "pad_id"), [("<|endoftext|>", 49407), ("!", 0)])
def test_tokens_are_open_clips(pad, pad_id):
    """Up to the end token they are equal.

    open_clip pads with 0 and replaces typographic quotes, which others do not.
    """
    tokenizer, theirs = build_tokenizer(pad), open_clip.get_tokenizer("ViT-L-14")
    assert len(tokenizer) == 49408
    for text in SENTENCES:
        text = text.replace("“", '"').replace("”", '"')
        if pad == "!":
            text = text.replace("!", "")  # of SD 2.x it is the pad token, which transformers cuts out of words
        ours = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        expected = theirs([text])[0].tolist()
        length = expected.index(49407) + 1
        assert ours[:length] == expected[:length], text
        assert ours[length:] == [pad_id] * (77 - length)


@pytest.mark.parametrize(("kind", "pad_id"), [("sd1", 49407), ("sd2", 0)])
def test_a_single_file_whose_configs_have_no_tokenizer_takes_clips(kind, pad_id, models, folders, tmp_path):
    """Of which the small text encoder knows the first 1,500 tokens only: that is refused."""
    shutil.copytree(folders[kind], tmp_path / "config", ignore=shutil.ignore_patterns("tokenizer", "*.safetensors"))
    model = replace(
        models[kind, "safetensors"], path=str(tmp_path / "large.safetensors"), config=str(tmp_path / "config")
    )
    with pytest.raises(ConfigError, match=r"'<\|endoftext\|>' with the number 49407.* embeddings for 1500 tokens"):
        load_components(replace(model, path=models[kind, "safetensors"].path), torch.float32)
    file = tmp_path / "config" / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 49408}))
    tensors = load_file(models[kind, "safetensors"].path)
    (key,) = (key for key in tensors if key.endswith(("token_embedding.weight",)))
    save_file(tensors | {key: torch.zeros(49408, tensors[key].shape[1])}, model.path)
    tokenizer = load_components(model, torch.float32).tokenizer
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.model_max_length) == (49408, pad_id, 77)


# ---------------------------------------------------------------------------------------------------------------------
# Another UNet.


@pytest.mark.slow
def test_another_unet_comes_from_a_folder_a_subfolder_or_the_hub(folders, offline, tmp_path):
    other = sd_pipelines.build_pipeline("sd1", seed=1)
    other.unet.save_pretrained(tmp_path / "run" / "checkpoint-300" / "unet")
    sd_pipelines.save_in_hub_cache(tmp_path / "run", offline, "someone/trained")
    run = tmp_path / "run"
    for spec in (f"{run}/checkpoint-300/unet", f"{run}:checkpoint-300/unet", "someone/trained:checkpoint-300/unet"):
        components = load_components(ModelConfig(path=str(folders["sd1"]), unet=spec), torch.float32)
        assert_equal(components.unet, other.unet)


def test_a_folder_may_be_made_of_links(folders, models, tmp_path):
    """As whoever exchanges the UNet alone does, or keeps weights on another disk; macOS's own files are none."""
    (tmp_path / "model").mkdir()
    for part in folders["sd1"].iterdir():
        (tmp_path / "model" / part.name).symlink_to(part)
    (tmp_path / "model" / "._model_index.json").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "loop").symlink_to(tmp_path)
    linked = load_components(ModelConfig(path=str(tmp_path / "model")), torch.float32)
    assert_equal(linked.unet, load_components(models["sd1", "folder"], torch.float32).unet)
    other = load_components(ModelConfig(path=str(folders["sd1"]), unet=f"{tmp_path}:model/unet"), torch.float32)
    assert_equal(other.unet, linked.unet)


def test_another_unet_must_be_of_the_same_architecture(folders, tmp_path):
    sd_pipelines.build_unet("sd1", attention_head_dim=4).save_pretrained(tmp_path / "heads")
    message = refusal(path=str(folders["sd1"]), unet=str(tmp_path / "heads"))
    assert "attention_head_dim is 4, and 8 in the pipeline" in message
    sd_pipelines.build_unet("sd1", cross_attention_dim=48).save_pretrained(tmp_path / "width")
    (tmp_path / "width" / "config.json").unlink()
    message = refusal(path=str(folders["sd1"]), unet=str(tmp_path / "width"))
    assert "attn2.to_k.weight is [32, 48], and [32, 32] in the pipeline" in message
    message = refusal(path=str(folders["sd1"]), unet=f"{tmp_path}:nothing")
    assert "there is no nothing/diffusion_pytorch_model.safetensors" in message


# ---------------------------------------------------------------------------------------------------------------------
# Refusals of folders.


def changed(folder, target, file, **changes):
    """A copy of the pipeline with keys of one of its JSON files changed; None removes one."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text()) | changes
    (target / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(target)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("StableDiffusionXLPipeline", "two text encoders and added time conditions"),
        ("StableDiffusion3Pipeline", "flow matching"),
        ("FluxPipeline", "flow matching"),
        ("StableDiffusionInpaintPipeline", "a mask"),
        ("StableDiffusionDepth2ImgPipeline", "a depth map"),
        ("StableDiffusionUpscalePipeline", "the image to enlarge"),
        ("StableDiffusionInstructPix2PixPipeline", "the image to edit"),
        ("WuerstchenPipeline", "of another kind"),
    ],
)
def test_other_pipelines_are_refused_by_their_class(kind, reason, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    message = refusal(path=str(tmp_path))
    assert message.startswith(f"model.path is {str(tmp_path)!r}, a {kind}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("unet/config.json", {"in_channels": 9}, "an inpainting one"),
        ("unet/config.json", {"in_channels": 5}, "a depth map"),
        ("unet/config.json", {"in_channels": 7}, "an upscaler's"),
        ("unet/config.json", {"in_channels": 8}, "InstructPix2Pix's"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type = 'projection'"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'"),
        ("unet/config.json", {"cross_attention_dim": 64}, "64 wide and whose text encoder makes them 32 wide"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "text encoder is a T5EncoderModel"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "XLMRobertaModel"]},
            "text_encoder is a XLMRobertaModel",
        ),
        ("model_index.json", {"vae": [None, None]}, "has no vae"),
    ],
)
def test_folders_of_other_models_are_refused(file, changes, reason, folders, tmp_path):
    assert reason in refusal(path=changed(folders["sd1"], tmp_path / "copy", file, **changes))


def test_broken_folders_are_refused(folders, tmp_path):
    copy = tmp_path / "copy"
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(folders["sd1"], copy)
    describe(ModelConfig(path=str(copy)))

    assert "there is no model_index.json" in refusal(path=str(tmp_path))
    assert "there is no such folder or file" in refusal(path=str(tmp_path / "nowhere"))
    assert "does not have of its unet" in refusal(path=str(copy), variant="fp16")
    assert "model.config is 'x'" in refusal(path=str(copy), config="x")

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refusal(path=str(copy))
    tensors = load_file(folders["sd1"] / "unet" / weights.name)
    removed = tensors.pop("mid_block.resnets.0.conv1.weight")
    save_file(tensors, weights)
    assert "whose UNet lacks mid_block.resnets.0.conv1.weight" in refusal(path=str(copy))
    save_file(tensors | {"mid_block.resnets.0.conv1.weight": removed[:1].clone()}, weights)
    message = "mid_block.resnets.0.conv1.weight is [1, 64, 3, 3], and [64, 64, 3, 3] in its config"
    assert message in refusal(path=str(copy))

    weights.rename(weights.with_suffix(".bin"))
    assert "as .bin, which would have to be executed" in refusal(path=str(copy))
    shutil.rmtree(copy / "unet")
    assert "there is no unet/config.json" in refusal(path=str(copy))
    (copy / "model_index.json").write_text("{")
    assert "model_index.json is not JSON" in refusal(path=str(copy))


def test_a_variant_is_what_is_loaded(pipelines, tmp_path):
    other = sd_pipelines.build_pipeline("sd1", seed=1)
    sd_pipelines.save_folder(pipelines["sd1"], tmp_path)
    sd_pipelines.save_folder(other, tmp_path, variant="fp16")
    for variant, expected in (("", pipelines["sd1"]), ("fp16", other)):
        components = load_components(ModelConfig(path=str(tmp_path), variant=variant), torch.float32)
        for part in PARTS:
            assert_equal(getattr(components, part), getattr(expected, part))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals of single files.


def test_single_files_of_other_models_are_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for tensors, reason in [
        ({first: (320, 4, 3, 3), "conditioner.embedders.0.transformer.x": (1,)}, "SDXL: it has two text encoders"),
        ({"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (1,)}, "SD3"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (1,)}, "Flux"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (1,)}, "a LoRA"),
        ({first: (320, 9, 3, 3)}, "an inpainting one"),
        ({first: (320, 5, 3, 3)}, "a depth map"),
        ({first: (320, 4, 3, 3)}, "neither SD 1.x (768) nor 2.x (1024)"),
        (
            {"down_blocks.0.resnets.0.conv1.weight": (1,)},
            "a file without model.diffusion_model.input_blocks.0.0.weight",
        ),
    ]:
        write_header(path, tensors)
        assert reason in refusal(path=str(path))


def test_incomplete_and_broken_single_files_are_refused(models, tmp_path):
    whole = models["sd1", "safetensors"]
    tensors = load_file(whole.path)
    path = tmp_path / "file.safetensors"
    where = {"path": str(path), "config": whole.config}

    save_file({key: value for key, value in tensors.items() if "first_stage" not in key}, path)
    assert "a file without the vae (first_stage_model.*)" in refusal(**where)
    save_file({key: value for key, value in tensors.items() if key != "first_stage_model.quant_conv.bias"}, path)
    assert "first_stage_model.quant_conv.bias is missing" in refusal(**where)
    other = replace(models["sd2", "safetensors"], config=whole.config)
    assert "has shape" in refusal(path=other.path, config=other.config)

    path.write_bytes(Path(whole.path).read_bytes()[:-1])
    assert "not a whole safetensors file" in refusal(**where)
    path.write_bytes(b"")
    assert "an empty file" in refusal(**where)
    path.unlink()
    assert "there is no such file" in refusal(**where)
    (tmp_path / "file.zip").write_bytes(b"PK")
    assert ".safetensors or .ckpt is accepted" in refusal(path=str(tmp_path / "file.zip"))


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_torch_files_are_read_without_executing_them(models, tmp_path):
    path = tmp_path / "file.ckpt"
    whole = Path(models["sd1", "ckpt"].path)
    for zipped in (True, False):
        torch.save({"state_dict": {}, "callbacks": Harmful()}, path, _use_new_zipfile_serialization=zipped)
        assert "would have to be executed to be read" in refusal(path=str(path))
    for content in (whole.read_bytes()[:100_000], b"weights", b"PK\x03\x04"):
        path.write_bytes(content)
        assert "not a whole torch file" in refusal(path=str(path))
    torch.save(torch.load(whole)["state_dict"], path, _use_new_zipfile_serialization=False)
    describe(replace(models["sd1", "ckpt"], path=str(path)))


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_is_diffusers_own(kind, models, pipelines, tmp_path, caplog):
    trained = sd_pipelines.build_pipeline(kind, seed=1).unet.to(memory_format=torch.channels_last)
    components = load_components(models[kind, "safetensors"], torch.float32)
    save_pipeline(tmp_path, replace(components, unet=trained), torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert not [record for record in caplog.records if "safety" in record.getMessage()]
    assert loaded.safety_checker is None
    assert not loaded.config.requires_safety_checker
    assert_equal(loaded.unet, trained.half())
    for part in ("vae", "text_encoder"):
        expected = {name: tensor.half() for name, tensor in getattr(pipelines[kind], part).state_dict().items()}
        found = getattr(loaded, part).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert DDIMScheduler.from_config(loaded.scheduler.config).config.prediction_type == (
        "epsilon" if kind == "sd1" else "v_prediction"
    )
    assert (
        loaded.tokenizer(TEXTS, padding="max_length").input_ids
        == components.tokenizer(TEXTS, padding="max_length").input_ids
    )
    again = load_components(ModelConfig(path=str(tmp_path)), torch.float16)
    assert_equal(again.text_encoder, loaded.text_encoder)
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    assert {"vocab.json", "merges.txt"} <= {file.name for file in (tmp_path / "tokenizer").iterdir()}


def test_the_shipped_pipeline_loads_by_its_name():
    components = load_components(ModelConfig(path="shapes"), torch.float32)
    expected = load_file(SHAPES_PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(components.unet.state_dict()[name], tensor.float()) for name, tensor in expected.items())
