"""A plain trainer, to measure ours against: what public GRPO and DDPO trainers for Stable Diffusion 1.x do.

It learns the same from the same: tests/bench/test_throughput.py compares latents, log-probs, rewards and gradients.
What is slow about it is what is slow about them, seen in ddpo-pytorch (scripts/train.py and
diffusers_patch/ddim_with_logprob.py), in DanceGRPO's train_grpo_sd.py, which began as a copy of that, and in
SafeDiffusion-R1's train.py, which began as a copy of this one:

    batches of 4       `train.batch_size` of SafeDiffusion-R1's runs, for drawing as for learning; all steps of 4
                       samples, a pass for each, before the next 4
    autocast           over float32 weights, which are cast anew in every pass; contiguous memory, no channels_last
    eager steps        diffusers' DDIM formulas operation by operation; alphas are looked up on the host, which waits
                       for the device at every step (once here, six times in ddim_with_logprob.py)
    whole trajectories latents and log-probs in lists, stacked at the end of a batch
    rewards            image by image: to the host, PIL, a JPEG file, back, the encoder's own transform, a pass for one
                       image and one for its text, which many images share (SafeDiffusion-R1's and DanceGRPO's loop over
                       `images`)
    optimizer          torch.optim.AdamW after clip_grad_norm_
    empty_cache        after every batch of samples, on CUDA

What is better here than in one or the other, so that it is not slow by mistake: log-probs are of the float32 latents
that are stored; progress bars, barriers and prints are left out; frozen parts are in half precision on CUDA and shared
with ours; a KL term in closed form where the settings have one, of which public trainers for SD 1.x have none.

`Techniques` swaps one plain way after the other for ours: the first rows of the ladder.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from diffusers import DDIMScheduler
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from fastgrpo.costs.throughput import Accounting, Rows, rollout_rows
from fastgrpo.grpo.advantages import advantages
from fastgrpo.grpo.steps import trained_steps
from fastgrpo.kernels.ddim_step import ddim_step
from fastgrpo.kernels.grpo_step import grpo_step
from fastgrpo.policy import Policy
from fastgrpo.prompts import PromptSource
from fastgrpo.rewards.encoder import OpenClipEncoder
from fastgrpo.rewards.steering import steer
from fastgrpo.rollout import initial_noise
from fastgrpo.run.metrics import Stopwatch
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.console import Console
from fastgrpo.system.randomness import generator_for
from fastgrpo.types import NEGATIVE, Prompt

BATCH = 4
"""Samples drawn together, and learned from together."""


@dataclass(frozen=True)
class Techniques:
    """Which of our ways stand in for the plain ones.

    batch: samples drawn together and (sample, step) pairs learned from together, whatever their steps; 0 is the plain 4
    samples, of which one step after the other is learned from. operators: `ddim_step` and `grpo_step` on the device,
    nothing looked up on the host. rewards: images stay on the device and are scored together, texts once.
    """

    batch: int = 0
    operators: bool = False
    rewards: bool = False


PLAIN = Techniques()


@dataclass(frozen=True)
class Samples:
    """What a rollout of B samples left behind, on the device.

    latents: [B, T + 1, C, H, W] float32. log_probs: [B, T] float32. images: [B, 3, h, w] float32 in [0, 1].
    prompts: each sample's. embeds: [B, L, D].
    """

    latents: Tensor
    log_probs: Tensor
    images: Tensor
    prompts: tuple[Prompt, ...]
    embeds: Tensor


class Baseline:
    """The plain trainer. unet: its own copy of the weights, float32."""

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule,
        encoder: OpenClipEncoder,
        direction: Tensor,
        config: TrainConfig,
        source: PromptSource,
        techniques: Techniques = PLAIN,
    ):
        """policy: whose weights it begins with. direction: the safety axis, of `encoder`. schedule: of the operators,
        and which steps are learned from. config: the settings; of the engine, nothing.
        """
        self.policy, self.config, self.source, self.techniques = policy, config, source, techniques
        self.encoder, self.direction, self.schedule = encoder, direction, schedule
        self.unet = copy.deepcopy(policy.unet).to(memory_format=torch.contiguous_format).eval()
        self.base = copy.deepcopy(self.unet).requires_grad_(False) if config.grpo.kl > 0 else None
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay
        )
        self.scheduler = DDIMScheduler.from_config(dict(policy.scheduler_config))
        self.scheduler.set_timesteps(config.rollout.steps)
        preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(encoder.model))
        self.preprocess = image_transform_v2(preprocess, is_train=False)

    def iterate(
        self, iteration: int, accounting: Accounting | None = None, console: Console | None = None
    ) -> dict[str, float]:
        """Iteration number `iteration` (from 1).

        console: shows its stages. Returns what `fastgrpo.training.iterate` does of times, speeds and rewards.
        """
        policy, watch, console = self.policy, Stopwatch(self.policy.device), console or Console(quiet=True)
        prompts = self.source.batch(iteration - 1)
        with watch("rollout"), console.bar("rollout"):
            samples = self.rollout(prompts, generator_for(self.config.seed, iteration, "rollout", policy.device))
        with watch("reward"), console.bar("reward"):
            rewards = self.score(samples)
        with watch("update"), console.bar("update") as bar:
            generator = generator_for(self.config.seed, iteration, "update", "cpu")
            pairs = self.update(samples, rewards, generator, bar.reach)
        values = {"reward/mean": float(rewards.mean()), **watch.metrics(images=rewards.numel())}
        if accounting:
            count = pairs * self.config.rollout.halves
            learned = Rows(forward=count if self.base is not None else 0, forward_backward=count)
            work = {"rollout": rollout_rows(self.config, rewards.numel()), "update": learned}
            values |= accounting.metrics(work, watch.seconds, rewards.numel())
        return values

    @torch.no_grad()
    def rollout(self, prompts: Sequence[Prompt], generator: torch.Generator) -> Samples:
        """Draw `group_size` images for each prompt, a batch at a time."""
        config, policy = self.config, self.policy
        each = [prompt for prompt in prompts for _ in range(config.group_size)]
        starts = initial_noise(
            1, len(prompts), config.group_size, policy.latent_shape, config.rollout.initial_noise, generator
        )
        batches = []
        for first in range(0, len(each), self.techniques.batch or BATCH):
            part = slice(first, first + (self.techniques.batch or BATCH))
            batches.append(self._draw(each[part], starts[part], generator))
            if policy.device.type == "cuda":
                torch.cuda.empty_cache()
        columns = (torch.cat(column) for column in zip(*batches, strict=True))
        latents, log_probs, images, embeds = columns
        return Samples(latents, log_probs, images, tuple(each), embeds)

    def _draw(self, prompts: list[Prompt], latents: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        embeds = self.policy.encode([prompt.text for prompt in prompts])
        trajectory, log_probs = [latents], []
        for position, timestep in enumerate(self.scheduler.timesteps.to(latents.device)):
            timesteps = timestep.expand(len(latents))
            output = self._output(self.unet, latents, timesteps, embeds)
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            if self.techniques.operators:
                step = torch.full((1,), position, device=latents.device)
                guidance = self.config.rollout.guidance
                latents, log_prob = ddim_step(output, latents, self.schedule.tables, step, guidance, noise)
            else:
                mean, sigma = self._mean(self._guided(output), latents, timesteps)
                latents = mean + sigma * noise
                log_prob = _log_prob(latents, mean, sigma)
            trajectory.append(latents)
            log_probs.append(log_prob)
        with self._autocast():
            vae = self.policy.vae
            scaled = (latents / vae.config.scaling_factor).to(self.policy.dtype)
            images = vae.decode(scaled, return_dict=False)[0]
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        return torch.stack(trajectory, dim=1), torch.stack(log_probs, dim=1), images, embeds

    @torch.no_grad()
    def score(self, samples: Samples) -> Tensor:
        """The steered reward of every image, [P, G] float32."""
        if self.techniques.rewards:
            return self._score_together(samples)
        rewards = []
        with tempfile.TemporaryDirectory() as folder:
            for number, (image, prompt) in enumerate(zip(samples.images, samples.prompts, strict=True)):
                pixels = (image.float().cpu().permute(1, 2, 0) * 255).round().byte().numpy()
                file = Path(folder) / f"{number}.jpg"
                Image.fromarray(pixels).save(file)
                with Image.open(file) as opened:
                    prepared = self.preprocess(opened.convert("RGB"))[None].to(self.encoder.device)
                with self._autocast():
                    features = self.encoder.model.encode_image(prepared)
                    text = self.encoder.encode_text([prompt.text])
                target = self._targets(text, [prompt])
                rewards.append((nn.functional.normalize(features.float(), dim=-1) * target).sum().item())
        return torch.tensor(rewards, device=self.policy.device).view(-1, self.config.group_size)

    def _score_together(self, samples: Samples) -> Tensor:
        prompts = samples.prompts[:: self.config.group_size]
        targets = self._targets(self.encoder.encode_text([prompt.text for prompt in prompts]), prompts)
        features = self.encoder.encode_image(samples.images, self.config.reward.batch)
        return torch.einsum("pge,pe->pg", features.view(len(prompts), -1, features.shape[-1]), targets)

    def _targets(self, text: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        negative = torch.tensor([prompt.label == NEGATIVE for prompt in prompts], device=text.device)
        return steer(text, self.direction, self.config.reward.alpha, self.config.reward.mode, negative)

    def update(
        self,
        samples: Samples,
        rewards: Tensor,
        generator: torch.Generator,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> int:
        """Take the iteration's optimizer steps. generator: on the CPU. Returns how many pairs were learned from.

        progress: told how many optimizer steps of how many are done.
        """
        config, grpo = self.config, self.config.grpo
        advantage, _ = advantages(rewards, grpo.advantage, grpo.std_floor, grpo.advantage_clamp)
        advantage, learned = advantage.flatten(), 0
        for number, part in enumerate(self._parts(len(samples.log_probs), generator), start=1):
            size = sum(len(sample) for sample, _ in part)
            for sample, step in part:
                sample, step = sample.to(advantage.device), step.to(advantage.device)
                self._learn(samples, sample, step, advantage[sample], 1 / size)
            nn.utils.clip_grad_norm_(self.unet.parameters(), config.optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            learned += size
            progress(number, config.updates_per_iteration)
        return learned

    def _parts(self, count: int, generator: torch.Generator) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For every optimizer step its batches of (sample, step): [N] int64 each."""
        steps = trained_steps(self.schedule, self.config.grpo, iteration=1)
        if self.techniques.batch:
            pairs = torch.randperm(count * len(steps), generator=generator)
            for dealt in pairs.tensor_split(self.config.updates_per_iteration):
                yield [(some % count, steps[some // count]) for some in dealt.split(self.techniques.batch)]
            return
        for dealt in torch.randperm(count, generator=generator).tensor_split(self.config.updates_per_iteration):
            # Every sample's steps in an order of its own.
            orders = torch.stack([steps[torch.randperm(len(steps), generator=generator)] for _ in dealt])
            together = zip(dealt.split(BATCH), orders.split(BATCH), strict=True)
            yield [(some, step) for some, order in together for step in order.unbind(dim=1)]

    def _learn(self, samples: Samples, sample: Tensor, step: Tensor, advantage: Tensor, weight: float) -> None:
        """One pass both ways, which adds to `.grad`. weight: of a pair's loss."""
        grpo, guidance = self.config.grpo, self.config.rollout.guidance
        latents, taken = samples.latents[sample, step], samples.latents[sample, step + 1]
        old, embeds = samples.log_probs[sample, step], samples.embeds[sample]
        timesteps = self.schedule.timesteps[step]
        output = self._output(self.unet, latents, timesteps, embeds)
        base = None
        if self.base is not None:
            with torch.no_grad():
                base = self._output(self.base, latents, timesteps, embeds)
        if self.techniques.operators:
            clips = {"clip_low": grpo.clip_low, "clip_high": grpo.clip_high}
            result = grpo_step(
                output.detach(), latents, taken, self.schedule.tables, step, guidance, old,
                advantage=advantage, weight=torch.full_like(advantage, weight),
                base_output=base, kl_weight=grpo.kl, **clips,
            )  # fmt: skip
            output.backward(result.gradient)
            return
        mean, sigma = self._mean(self._guided(output), latents, timesteps)
        ratio = torch.exp(_log_prob(taken, mean, sigma) - old)
        clipped = ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        if base is not None:
            base_mean, _ = self._mean(self._guided(base), latents, timesteps)
            loss = loss + grpo.kl * ((mean - base_mean) ** 2 / (2 * sigma**2)).mean(dim=(1, 2, 3))
        (weight * loss.sum()).backward()

    def _output(self, unet: nn.Module, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """[2N, C, H, W], without and with the prompts; at guidance 1 the latter alone."""
        if self.config.rollout.halves == 2:
            embeds = torch.cat([self.policy.unconditional.expand_as(embeds), embeds])
            latents, timesteps = torch.cat([latents] * 2), torch.cat([timesteps] * 2)
        with self._autocast():
            return unet(latents, timesteps, embeds, return_dict=False)[0]

    def _guided(self, output: Tensor) -> Tensor:
        if self.config.rollout.halves == 1:
            return output.float()
        without, within = output.float().chunk(2)
        return without + self.config.rollout.guidance * (within - without)

    def _mean(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, C, H, W] and sigma [N, 1, 1, 1] of a DDIM step (arXiv 2010.02502, equations 12 and 16)."""
        scheduler = self.scheduler
        stride = scheduler.config.num_train_timesteps // self.config.rollout.steps
        rows = []
        for timestep in timesteps.tolist():  # waits for the device
            now, before = scheduler.alphas_cumprod[timestep].item(), timestep - stride
            after = (scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod).item()
            sigma = self.config.rollout.eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
            rows.append((now, after, sigma))
        now, after, sigma = torch.tensor(rows, device=latents.device).T.reshape(3, -1, 1, 1, 1)
        if scheduler.config.prediction_type == "epsilon":
            start, noise = (latents - (1 - now).sqrt() * output) / now.sqrt(), output
        else:
            start = now.sqrt() * latents - (1 - now).sqrt() * output
            noise = now.sqrt() * output + (1 - now).sqrt() * latents
        return after.sqrt() * start + (1 - after - sigma**2).sqrt() * noise, sigma

    def _autocast(self) -> AbstractContextManager:
        device, dtype = self.policy.device, self.policy.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _log_prob(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """[N]: the mean over C, H, W of the Gaussian's log-density, term by term as the formula is written."""
    terms = (
        -((sample - mean) ** 2) / (2 * sigma**2) - torch.log(sigma) - torch.log(torch.sqrt(torch.tensor(2 * torch.pi)))
    )
    return terms.mean(dim=(1, 2, 3))
