"""A policy's step in plain PyTorch operations, for tests to compare with."""

from diffusers import UNet2DConditionModel
from torch import Tensor

from fastgrpo.policy import Policy
from fastgrpo.schedule import Schedule


def predict(
    policy: Policy,
    latents: Tensor,
    timesteps: Tensor,
    embeds: Tensor,
    guidance: float,
    unet: UNet2DConditionModel | None = None,
) -> Tensor:
    """The guided output, [N, C, H, W] float32: uncond + guidance * (cond - uncond)."""
    rows = policy.rows(latents, timesteps, embeds, guidance)
    output = (unet or policy.forward)(*rows, return_dict=False)[0].float()
    if guidance == 1.0:
        return output
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def step_mean(schedule: Schedule, step: Tensor | int, latents: Tensor, output: Tensor) -> Tensor:
    """[N, C, H, W] float64: the mean of the next latent, from a guided output."""
    coef_sample = schedule.coef_sample[step].double().reshape(-1, 1, 1, 1)
    coef_output = schedule.coef_output[step].double().reshape(-1, 1, 1, 1)
    return coef_sample * latents.double() + coef_output * output.double()
