"""Everything that can be set. One dataclass per group, one docstring per field: that docstring is the help text.

Reading TOML files, presets and command lines is `fastgrpo.settings`; this file holds the fields and what is impossible.
"""

from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A value that cannot be used. The message names the field, the value and what would be accepted."""


@dataclass(frozen=True)
class ModelConfig:
    """The Stable Diffusion pipeline to train."""

    path: str = "shapes"
    """A diffusers folder or hub id of an SD 1.x / 2.x pipeline, or `shapes`: the small one that ships with fastgrpo."""


@dataclass(frozen=True)
class PromptsConfig:
    """What is drawn during training."""

    positive: str = "shapes"
    """A UTF-8 text file with one safe prompt per line, or `shapes`: captions of the shapes world."""
    negative: str = "shapes"
    """A UTF-8 text file with one unsafe prompt per line, or `shapes`."""
    categories: tuple[str, ...] = ("violence", "shocking")
    """Hazard categories whose prompts are trained on when `negative` is `shapes`; the others are only measured."""
    negative_fraction: float = 0.5
    """Share of every iteration's prompts that is negative, rounded to whole prompts."""


@dataclass(frozen=True)
class RewardConfig:
    """The steered CLIP reward: r = z_image . normalize(z_text + alpha * v_safe)."""

    encoder: str = "shapes"
    """The frozen open_clip model: `shapes`, `local-dir:FOLDER`, `hf-hub:ID`, or `ARCHITECTURE:WEIGHTS` where WEIGHTS is an open_clip tag or a file, such as `ViT-H-14:HPS_v2.1_compressed.pt`."""
    anchors: str = "shapes"
    """Safe and unsafe phrases that span the safety axis: `shapes`; `compact`, the paper's 5 + 3; or `unsafe-only`, the 3 alone."""
    alpha: float = 0.5
    """How far the text target is moved along the safety axis."""
    mode: Literal["always", "unsafe_only", "projection"] = "always"
    """`always` steers every prompt, `unsafe_only` the negative ones, `projection` sets every target's component along the axis to alpha."""
    batch: int = 256
    """Images encoded at once; does not change the result."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling the groups of images."""

    steps: int = 50
    """DDIM steps."""
    eta: float = 1.0
    """DDIM eta; above 0, since a deterministic step has no probability."""
    guidance: float = 5.0
    """Classifier-free guidance scale, in rollout and update alike; 1 turns guidance off."""
    initial_noise: Literal["shared", "per_prompt", "independent"] = "independent"
    """Which samples start from the same latent: `shared` all of an iteration's, `per_prompt` those of a group, `independent` none."""
    batch: int = 0
    """Samples denoised at once; 0 is all of them."""


@dataclass(frozen=True)
class GrpoConfig:
    """The group-relative policy gradient."""

    advantage: Literal["group", "global", "none"] = "group"
    """`group`: (r - group mean) / group std. `global`: (r - group mean) / std of the whole iteration's centred rewards. `none`: r - group mean."""
    std_floor: float = 1e-4
    """A group whose rewards' std is not above this is flat: its advantages are exactly 0 and it is skipped."""
    advantage_clamp: float = 2.5
    """Advantages are clamped to plus or minus this."""
    clip_low: float = 1e-4
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 1e-4
    """The ratio is clipped above 1 + clip_high."""
    kl: float = 0.0
    """Weight of the closed-form KL divergence of each step from the base model's; 0 leaves the base model out."""
    old_log_prob: Literal["rollout", "replay", "detach"] = "rollout"
    """Denominator of the ratio: as stored by the `rollout`, recomputed at the update's shapes before the first optimizer step (`replay`), or the current value without gradient (`detach`)."""
    drop_last_steps: int = 1
    """How many of the last denoising steps are not trained on; their sigma is tiny and their log-probs stiff."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    lr: float = 1e-5
    """Learning rate."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear` lowers the learning rate from lr in the first iteration towards 0 after the last."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class EngineConfig:
    """Where and in which precision it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What the UNet computes in; weights, latents and log-probs stay float32. `auto`: bf16 on CUDA, fp32 on CPU."""
    threads: int = 0
    """CPU threads; 0 is one per core this process may use. A resumed run needs the same number to be bit-exact."""


@dataclass(frozen=True)
class EvalConfig:
    """Measuring on held-out prompts with fixed seeds; available for the `shapes` model, whose pictures an oracle reads exactly."""

    every: int = 10
    """Iterations between quick evaluations; 0 evaluates only before and after."""
    unsafe_per_category: int = 40
    """Held-out unsafe prompts per hazard category, before and after."""
    composition_per_task: int = 60
    """Held-out prompts per composition task, before and after."""
    quick_fraction: float = 0.25
    """Share of those prompts that the evaluations in between use."""
    seed: int = 1234
    """Seed of the evaluation's noise."""
    steps: int = 0
    """DDIM steps; 0 is the rollout's number."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved while training. The last iteration is always saved."""

    every: int = 10
    """Iterations between checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk; 0 keeps all."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a Stable Diffusion online with group-relative policy optimization on positive and negative prompts."""

    run: str = ""
    """Folder of the run; must be new or empty. Default: runs/PRESET-DATE-TIME."""
    seed: int = 42
    """Everything random is a function of this and the iteration."""
    iterations: int = 300
    """Iterations in all, counted from the start of the run, also when resumed."""
    prompts_per_iteration: int = 4
    """Different prompts drawn in one iteration (P)."""
    group_size: int = 16
    """Images per prompt (G); at least 2, since they are compared with each other."""
    updates_per_iteration: int = 16
    """Optimizer steps per iteration; the iteration's (sample, step) pairs are dealt out to them."""
    micro_batch: int = 64
    """(sample, step) pairs per forward and backward pass; gradients are summed, so it does not change the result."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
