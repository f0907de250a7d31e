"""What a model's configs say is obeyed as diffusers' pipeline obeys it, or refused."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

from fastgrpo.models.check import describe
from fastgrpo.policy import load_policy
from fastgrpo.rollout import draw_images
from fastgrpo.schedule import make_schedule
from fastgrpo.settings.schema import ModelConfig
from fastgrpo.system.errors import ConfigError
from support import sd_pipelines
from support.models import change, refusal

CPU = torch.device("cpu")
PROMPT = "a red cube"


@pytest.fixture(scope="module")
def tiny(pipelines, tmp_path_factory):
    """sd1 with two levels in UNet and VAE: latents of 8 x 8, images of 16 x 16."""
    torch.manual_seed(0)
    levels = {"block_out_channels": (8, 16), "layers_per_block": 1}
    vae = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    parts = {**pipelines["sd1"].components, "unet": tiny_unet()}
    parts["vae"] = AutoencoderKL(**vae, **levels, norm_num_groups=8)
    return sd_pipelines.save_folder(
        StableDiffusionPipeline(**parts, requires_safety_checker=False), tmp_path_factory.mktemp("tiny")
    )


def tiny_unet(**changes):
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1}
    blocks["down_block_types"] = ("CrossAttnDownBlock2D", "DownBlock2D")
    blocks["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    return sd_pipelines.build_unet("sd1", **blocks | changes)


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "tiny")


def diffusers_picture(folder):
    """DDIM with eta 1 by diffusers alone, from what its pipeline makes of the folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    config = dict(pipeline.scheduler.config)
    pipeline.scheduler = DDIMScheduler.from_config({"clip_sample": False} | config)  # PNDM's do not have it
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPT, num_inference_steps=3, guidance_scale=3.0, eta=1.0, generator=generator, output_type="pt")[
        0
    ]


def our_picture(folder):
    policy = load_policy(ModelConfig(path=str(folder)), CPU, torch.float32)
    schedule = make_schedule(policy.scheduler_config, 3, 1.0, CPU)
    return draw_images(policy, policy.encode([PROMPT]), schedule, 3.0, [3])


@pytest.fixture(scope="module")
def usual_picture(tiny):
    return diffusers_picture(tiny)


SCHEDULER, VAE, TEXT, UNET_CONFIG = (
    "scheduler/scheduler_config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "unet/config.json",
)
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
OBEYED = [
    (SCHEDULER, {"timestep_spacing": "trailing"}),
    (SCHEDULER, {"set_alpha_to_one": True}),
    (SCHEDULER, {"beta_schedule": "linear"}),
    (SCHEDULER, {"beta_end": 0.02}),
    (SCHEDULER, {"prediction_type": "v_prediction"}),
    (SCHEDULER, {"prediction_type": "v_prediction", "timestep_spacing": "trailing", **DDIM}),
    (VAE, {"scaling_factor": 0.5}),
    (VAE, {"norm_num_groups": 4}),
    (TEXT, {"use_attention_mask": True}),
    (TEXT, {"layer_norm_eps": 0.1}),
    (TEXT, {"hidden_act": "gelu"}),
    (UNET_CONFIG, {"center_input_sample": True}),
    (UNET_CONFIG, {"flip_sin_to_cos": False}),
    (UNET_CONFIG, {"freq_shift": 1}),
    (UNET_CONFIG, {"norm_eps": 0.1}),
    (UNET_CONFIG, {"norm_num_groups": 16}),
    (UNET_CONFIG, {"mid_block_scale_factor": 2}),
    (UNET_CONFIG, {"time_embedding_act_fn": "silu"}),
    (UNET_CONFIG, {"attention_head_dim": 4}),
    (UNET_CONFIG, {"act_fn": "gelu"}),
    (UNET_CONFIG, {"sample_size": [8, 16]}),
]


@pytest.mark.parametrize(("file", "changes"), OBEYED, ids=[f"{file.split('/')[0]}-{'-'.join(c)}" for file, c in OBEYED])
def test_what_a_config_changes_in_diffusers_picture_it_changes_in_ours(file, changes, tiny_copy, usual_picture):
    change(tiny_copy, file, **changes)
    expected = diffusers_picture(tiny_copy)
    same_size = expected.shape == usual_picture.shape
    effect = (expected - usual_picture).abs().max() if same_size else 1.0
    assert effect > 3e-4
    # Rounding in another order is magnified by late steps, as the effect is: the right picture has to be five times
    # nearer.
    assert (our_picture(tiny_copy) - expected).abs().max() < 0.2 * effect


NOTHING = [
    (SCHEDULER, {"steps_offset": 0}),  # the pipeline sets it to 1
    (SCHEDULER, {**DDIM, "clip_sample": True}),  # and this to false
    (SCHEDULER, {**DDIM, "clip_sample_range": 2.0, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 2.0}),
    (VAE, {"force_upcast": False}),
    (VAE, {"shift_factor": 0.3, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}),
    (TEXT, {"eos_token_id": 2}),
    (TEXT, {"return_dict": False}),
    (TEXT, {"projection_dim": 64, "output_hidden_states": True}),
    (UNET_CONFIG, {"upcast_attention": True}),
    (UNET_CONFIG, {"dropout": 0.5}),
    (UNET_CONFIG, {"resnet_out_scale_factor": 2.0, "resnet_skip_time_act": True}),  # of blocks that SD does not have
]


@pytest.mark.parametrize(
    ("file", "changes"), NOTHING, ids=[f"{file.split('/')[0]}-{'-'.join(c)}" for file, c in NOTHING]
)
def test_what_a_config_says_to_no_effect_in_diffusers_has_none_here(file, changes, tiny_copy, usual_picture):
    change(tiny_copy, file, **changes)
    expected = diffusers_picture(tiny_copy)
    assert (expected - usual_picture).abs().max() < 1e-3
    assert (our_picture(tiny_copy) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"only_cross_attention": True},
        {"only_cross_attention": [True, False], "mid_block_only_cross_attention": True},
        {"resnet_time_scale_shift": "scale_shift"},
        {"conv_in_kernel": 5, "conv_out_kernel": 1},
        {"time_embedding_type": "fourier"},
        {"transformer_layers_per_block": 2},
        {"layers_per_block": 3},
    ],
    ids="-".join,
)
def test_unets_of_other_make_draw_as_in_diffusers(changes, tiny_copy):
    torch.manual_seed(0)
    tiny_unet(**changes).save_pretrained(tiny_copy / "unet")
    assert (our_picture(tiny_copy) - diffusers_picture(tiny_copy)).abs().max() < 1e-3


def test_an_attention_mask_is_obeyed_to_the_bit(copy):
    """By the text encoder; the UNet is not given one, as in diffusers."""
    without = load_policy(ModelConfig(path=str(copy)), CPU, torch.float32).encode([PROMPT, ""])
    change(copy, TEXT, use_attention_mask=True)
    embeds, empty = StableDiffusionPipeline.from_pretrained(copy).encode_prompt([PROMPT], "cpu", 1, True)
    found = load_policy(ModelConfig(path=str(copy)), CPU, torch.float32).encode([PROMPT, ""])
    assert (found - torch.cat([embeds, empty])).abs().max() < 1e-5
    assert (found - without).abs().max() > 0.1


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        (UNET_CONFIG, {"sample_size": None}, "sample_size = None, so that nothing says how large its images are"),
        (UNET_CONFIG, {"sample_size": [8, 8, 8]}, "sample_size = [8, 8, 8]"),
        (UNET_CONFIG, {"attention_type": "gated"}, "attention_type = 'gated'"),
        (UNET_CONFIG, {"class_embeddings_concat": True}, "class_embeddings_concat = True"),
        (UNET_CONFIG, {"dual_cross_attention": True}, "dual_cross_attention = True"),
        (UNET_CONFIG, {"out_channels": 8}, "UNet has out_channels = 8; 4 is accepted"),
        (UNET_CONFIG, {"_class_name": "UNetMotionModel"}, "unet is a UNetMotionModel"),
        (UNET_CONFIG, {"num_attention_heads": 4}, "describes no UNet2DConditionModel"),
        (UNET_CONFIG, {"down_block_types": ["NoBlock"] * 4}, "describes no UNet2DConditionModel"),
        (UNET_CONFIG, {"quantization_config": {"quant_method": "bitsandbytes"}}, "unet is quantised"),
        (VAE, {"_class_name": "AutoencoderTiny"}, "vae is a AutoencoderTiny"),
        (VAE, {"latent_channels": 16}, "vae has latent_channels = 16; 4 is accepted"),
        (VAE, {"scaling_factor": "0.18"}, "scaling_factor = '0.18'"),
        (TEXT, {"quantization_config": {"quant_method": "gptq"}}, "text_encoder is quantised"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(file, changes, reason, copy):
    change(copy, file, **changes)
    assert reason in refusal(path=str(copy))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**DDIM, "thresholding": True}, "thresholding is true"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatchEulerDiscreteScheduler'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is true"),
    ],
)
def test_a_scheduler_that_cannot_be_obeyed_is_refused(changes, reason, copy):
    change(copy, SCHEDULER, **changes)
    scheduler = describe(ModelConfig(path=str(copy))).scheduler
    with pytest.raises(ConfigError) as caught:
        make_schedule(scheduler, 3, 1.0, CPU)
    assert reason in str(caught.value)
