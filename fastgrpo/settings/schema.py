"""Everything that can be set. One dataclass per group, one docstring per field: that docstring is the help text.

toml.py and command_line.py read it from files and flags; `fastgrpo.validation` says what is impossible.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fastgrpo.settings.paths import PathText, PathTexts
from fastgrpo.settings.suites import DetectorSettings, ShapesSplit, SuiteSettings

DIFFUSION_STEPS = 1000
"""Timesteps that every SD 1.x / 2.x was trained with."""


@dataclass(frozen=True)
class ModelConfig:
    """The Stable Diffusion pipeline to train."""

    path: PathText = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """An SD 1.x / 2.x pipeline: a folder, hub id or single file (.safetensors, .ckpt), or `shapes`, which is ours."""
    unet: PathText = ""
    """Another UNet: a folder or hub id, with its subfolder after a colon, as in `OWNER/NAME:checkpoint-300/unet`;
    or a file of its tensors, all or those that were tuned (.safetensors, .pt, .pth, .bin, .ckpt)."""
    config: PathText = ""
    """Diffusers folder or hub id whose configs describe a single file; empty: SD 1.x or 2.x, told from the file."""
    variant: str = ""
    """Variant of the weight files, such as `fp16`; empty: the plain ones."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty: its main branch."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the UNet predicts; `auto` believes the scheduler's config or what a single file says of itself.
    SD 2.x files that say nothing need it: `epsilon` for those of 512 pixels, `v_prediction` for those of 768."""
    lora_rank: int = 0
    """Rank of the LoRA adapters that are trained instead of the UNet's own weights; 0 trains the whole UNet."""
    lora_alpha: float = 0.0
    """LoRA's scale is lora_alpha / lora_rank; 0 stands for lora_rank, a scale of 1."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the modules that get adapters; the default is every attention projection."""


@dataclass(frozen=True)
class PromptsConfig:
    """What is drawn during training.

    A source of prompts is `shapes` (captions of the shapes world), a file (.txt with one prompt per line, .csv, .tsv or
    .jsonl with a column of them), or `hf:OWNER/NAME[:CONFIG][@SPLIT]`, a dataset on the Hugging Face hub.
    """

    positive: PathText = "geneval"
    """Source of safe prompts: `geneval` (generated, six composition tasks over COCO's classes), `shapes`, a file,
    or `hf:OWNER/NAME[:CONFIG][@SPLIT]`."""
    negative: PathText = "unsafe"
    """Source of unsafe prompts: `unsafe` (written for fastgrpo, seven categories), `shapes`, a file,
    or `hf:OWNER/NAME[:CONFIG][@SPLIT]`."""
    positive_column: str = "prompt"
    """Column of a CSV, TSV, JSONL or hub dataset that holds the positive prompts."""
    negative_column: str = "prompt"
    """Column that holds the negative prompts; both may come from one file."""
    category_column: str = ""
    """Column that holds each prompt's categories or tasks, separated by commas; empty: none is kept."""
    categories: tuple[str, ...] = ()
    """Categories of the negative prompts to train on; empty: all. Evaluations measure all.
    Of `shapes` there is also `general`: prompts for a hazard that do not say which."""
    negative_fraction: float = 0.5
    """Share of every iteration's prompts that is negative, rounded to whole prompts."""


@dataclass(frozen=True)
class ServiceConfig:
    """The servers that compute terms `service:NAME`, in processes or on machines of their own.

    docs/reward-service.md has the protocol and a server that is ready to use.
    """

    urls: tuple[str, ...] = ()
    """Addresses such as `http://judge:8000`. Each is asked at the start which scores it has; those that have the same
    share the images."""
    token: str = ""
    """Name of the environment variable that holds a token, which is sent as `Authorization: Bearer`; empty: none."""
    format: Literal["png", "raw"] = "png"
    """How images are sent: `png` in JSON, or `raw` 8-bit tensors, several times as large and quicker to make.
    Both hold the same pixels, of 8 bits."""
    batch: int = 16
    """Images of a request."""
    requests: int = 4
    """Requests that each server has at once, of each training process."""
    timeout: float = 60.0
    """Seconds until a request counts as failed."""
    retries: int = 8
    """How often each server is tried again in a row, after pauses of half a second and then twice as long each time, up
    to 30 s; then training stops with a checkpoint of the last finished iteration."""


@dataclass(frozen=True)
class RewardConfig(DetectorSettings):
    """What an image is worth: a weighted sum of terms.

    The term `steering` is the steered CLIP reward: r = z_image . normalize(z_text + alpha * v_safe).
    """

    terms: PathTexts = ("steering",)
    """Terms, each NAME or NAME=WEIGHT: `steering`, `clip`, `hpsv2`, `pickscore`, `aesthetic`, `compressibility`,
    `incompressibility`, `oracle` (of pictures of the shapes world), `safety:DETECTOR` with a detector of eval.suites
    (q16, nudenet, safety-checker, open-clip, oracle), `service:NAME` with a score that reward.service.urls have, or
    your own function as FILE.py:FUNCTION or MODULE:FUNCTION."""
    standardise: Literal["none", "group", "iteration"] = "none"
    """Whether each term has mean 0 and std 1 before it is weighted: over its `group`, or over the whole `iteration`."""
    encoder: PathText = "hpsv2"
    """The frozen open_clip model of `steering`: `hpsv2` (HPSv2.1 from the hub), `shapes`,
    `local-dir:FOLDER`, `hf-hub:ID`, `transformers:ID` with a folder or hub id of transformers' CLIPModel, or
    `ARCHITECTURE:WEIGHTS` with an open_clip tag or a file, as `ViT-H-14:HPS_v2.1_compressed.pt`."""
    clip_encoder: PathText = ""
    """The open_clip model of the term `clip`, in the same notation; empty: that of `steering`."""
    pickscore: PathText = "yuvalkirstain/PickScore_v1"
    """The model of the term `pickscore`: a folder or hub id of transformers' CLIPModel."""
    aesthetic: PathText = "trl-lib/ddpo-aesthetic-predictor"
    """The predictor of the term `aesthetic`, LAION's sac+logos+ava1-l14-linearMSE: a .safetensors or .pth file, or a
    folder or hub id with one."""
    aesthetic_encoder: PathText = "ViT-L-14-quickgelu:openai"
    """The open_clip model whose vectors the predictor was trained on, in the notation of reward.encoder."""
    anchors: PathText = "compact"
    """Safe and unsafe phrases that span the safety axis: `compact`, the paper's 5 + 3; `scaled`, 25 + 20 over
    seven categories; `unsafe-only`, compact's 3 alone; `shapes`; or a FILE.toml with lists `safe` and `unsafe`."""
    alpha: float = 0.5
    """How far the text target is moved along the safety axis."""
    mode: Literal["always", "unsafe_only", "projection"] = "always"
    """Steer `always` or `unsafe_only`, or set every target's component along the axis to alpha (`projection`)."""
    batch: int = 256
    """Images encoded at once; does not change the result."""
    tf32: bool = True
    """Encode images with TF32's matrix products on CUDA, several times as fast. With its rounding to 10 bits imitated,
    rewards moved by less than 0.004. Texts, and all that evaluates, stay float32."""
    service: ServiceConfig = field(default_factory=ServiceConfig)


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling the groups of images."""

    steps: int = 50
    """DDIM steps."""
    eta: float = 1.0
    """DDIM eta; above 0, since a deterministic step has no probability."""
    stochastic: Literal["all", "window"] = "all"
    """Which of a rollout's steps have noise: `all`, or those of grpo.window alone, which are learned from (MixGRPO).
    Pictures and evaluations have it in all."""
    steps_outside: int = 0
    """With `window`: steps before and after the window together, in place of the rest of rollout.steps, shared out by
    how many of those each covers; 0 is all of the rest."""
    solver_outside: Literal["ddim", "dpm++"] = "ddim"
    """What takes them, without noise: DDIM with eta 0, or DPM-Solver++(2M), which needs fewer."""
    guidance: float = 5.0
    """Classifier-free guidance scale, in rollout and update alike; 1 turns guidance off."""
    guidance_rescale: float = 0.0
    """How far guidance's contrast is taken back (arXiv 2305.08891), 0 to 1, wherever images are drawn.
    0 leaves it; the authors use 0.7, for v-prediction with zero terminal SNR."""
    initial_noise: Literal["shared", "per_prompt", "independent"] = "independent"
    """Samples that start from one latent: `shared` all of an iteration, `per_prompt` a group's, `independent` none."""
    branches: tuple[int, ...] = ()
    """Samples of a group share one path until the first step with noise, and branch there and at the next ones into so
    many each time: 2 4 makes a tree of 8 leaves, a group. An edge is learned from once, with the mean reward of its
    leaves, and what starts from one latent takes one pass of the UNet. Empty: every sample is drawn alone."""
    batch: int = 0
    """Samples denoised at once; 0 is all of them on a CPU.
    On CUDA, and in fixed shapes (engine.compile, engine.graphs), 0 is as many as a micro-batch has pairs."""
    decode_batch: int = 16
    """Latents decoded to images at once; the VAE's activations are large."""

    @property
    def halves(self) -> int:
        """UNet samples for each latent: two, without and with the prompt, where there is guidance."""
        return 1 if self.guidance == 1 else 2


@dataclass(frozen=True)
class GrpoConfig:
    """The group-relative policy gradient."""

    advantage: Literal["group", "global", "none"] = "group"
    """`group`: (r - group mean) / group std. `none`: r - group mean.
    `global`: (r - group mean) / std of the whole iteration's centred rewards."""
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
    kl_prompts: Literal["all", "positive"] = "all"
    """Prompts whose pairs the KL term counts for: `all`, or `positive`, which holds the base model where it is good and
    leaves it free where it is unsafe."""
    old_log_prob: Literal["rollout", "replay", "detach"] = "rollout"
    """Denominator of the ratio: the log-prob that the `rollout` stored; the first optimizer step's own and, for later
    ones, recomputed before it (`replay`); or the current value without gradient (`detach`).
    `rollout` becomes `replay` where the first optimizer step would find another ratio than 1."""
    epochs: int = 1
    """Passes over an iteration's (sample, step) pairs; `updates_per_iteration` is for all of them together."""
    drop_last_steps: int = 1
    """How many of the last denoising steps are not trained on; their sigma is tiny and their log-probs stiff."""
    step_fraction: float = 1.0
    """Share of the other steps that each sample is trained on, drawn anew in every iteration."""
    window: int = 0
    """Train on so many neighbouring steps only, a window that slides from the noisiest to the last; 0 is all steps."""
    window_every: int = 25
    """Iterations until the window slides on."""
    window_stride: int = 1
    """Steps by which the window slides."""
    ratio_norm: bool = False
    """RatioNorm of GRPO-Guard: one clip range for all steps, since the log-ratio is normalised at each."""
    trim: int = 0
    """How many of a group's highest and of its lowest rewards are left out, of its mean and std and of learning."""
    skip_clipped: bool = False
    """Leave out the pairs whose clipped ratio leaves no gradient; a forward pass finds them before every optimizer step
    but the first. It pays where more than half are clipped, and works only without a KL term."""
    best_of: int = 0
    """Learn from this many samples of every group only, half of them the best and half the worst; 0 is all of them."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, AdamW, and its learning rate."""

    lr: float = 1e-5
    """Learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """`linear` and `cosine` lower the learning rate from lr after the warm-up towards 0 after the last iteration."""
    warmup: int = 0
    """Iterations in which the learning rate rises to lr, in equal steps; a run of fewer ends below lr."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    moments: Literal["fp32", "8bit"] = "fp32"
    """What the two moments are held in. `8bit`: codes of 8 bits with a scale for every 256 (8-bit AdamW), 2 bytes a
    trained parameter instead of 8; quantized by torchao (`pip install 'fastgrpo[8bit]'`)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    ema: float = 0.0
    """Decay, per optimizer step, of an exponential moving average of the trained weights; 0 keeps none."""


@dataclass(frozen=True)
class GuardConfig:
    """Noticing that training collapses: pictures of positive prompts that become alike, or no longer match the prompts.

    The base model first draws four pictures of up to 384 positive prompts; running means are held against them.
    """

    action: Literal["off", "warn", "adapt", "stop"] = "warn"
    """What an alarm does: `warn` says so; `adapt` also raises the KL weight and lowers the learning rate, while it
    lasts up to tenfold, and needs a second UNet as grpo.kl does; `stop` saves a checkpoint and exits with code 3."""
    diversity_between: float = 0.8
    """Least diversity of different positive prompts' images, as a share of the base model's; 0 is no limit."""
    diversity_within: float = 0.5
    """The same of one prompt's images. It falls in good trainings too: the more pictures are what the prompt says, the
    more alike they are. No limit where they start from one latent (rollout.initial_noise), which makes them alike."""
    alignment: float = 0.25
    """How much less the positive prompts' images may match their prompts than the base model's do, in standard
    deviations of one prompt's images."""
    patience: int = 3
    """Iterations in a row beyond a limit until the alarm, and within it until the alarm ends."""


@dataclass(frozen=True)
class EngineConfig:
    """Where and in which precision it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the UNet computes in; trained weights, latents and log-probs stay float32.
    `auto`: bf16 on CUDA, fp32 on CPU. `fp16`, for GPUs without bf16, scales the loss."""
    threads: int = 0
    """CPU threads; 0 is one per core this process may use. A resumed run needs the same number to be bit-exact."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Whether the UNet's norms and activations run on fastgrpo's own kernels; `auto`: on CUDA."""
    attention: Literal["auto", "xformers", "cudnn", "flash", "sdpa"] = "auto"
    """Who computes attention: `sdpa` is PyTorch's own choice, `auto` on CUDA the fastest by measurement."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the UNet, unless its gradients differ from eager ones; `auto`: on CUDA."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """CUDA graphs of a denoising step and of a micro-batch; `auto`: on CUDA. Elsewhere `on` calls plainly."""
    reuse: Literal["auto", "on", "off"] = "auto"
    """Whether the rollout computes equal rows of a shared first step only once;
    `auto`: on CUDA, where no bit of the log-probs changes."""
    overlap: bool = True
    """On CUDA, decode and score finished groups while the next ones are drawn."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only the inputs of the UNet's blocks for the backward pass, which computes them again: the same gradients
    in less memory and more time. `auto`: on CUDA, where one pair would not fit into engine.memory without."""
    shard: Literal["auto", "none", "optimizer"] = "auto"
    """What several processes share out instead of each holding all of it: `optimizer` is AdamW's moments and the moving
    average (ZeRO-1), the same weights but for the order of sums. `auto`: on CUDA, where the memory plan of one
    micro-batch does not fit into engine.memory without."""
    offload: Literal["auto", "on", "off"] = "auto"
    """Keep what the UNet's passes do not need in the host's memory while it is unused: VAE, text encoder, the encoders
    of reward and eval.encoder, and optim.ema's average. Pictures are then decoded and scored after the rollout, not
    beside it. `auto`: on CUDA, where one pair would not fit into engine.memory without."""
    memory: float = 0.92
    """Share of the GPU's memory that a micro-batch found by measurement (micro_batch 0) may fill."""
    stuck_after: float = 120.0
    """Of several processes: seconds beyond the longest step so far after which one that does nothing ends the job.
    In the first iteration, evaluations and checkpoints five times as long; 0 lets the others wait for two hours."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What a reward, loss or gradient that is not finite does. The prompt, step and tensors are kept in the run's
    folder; then training stops, or goes on without that prompt's group or that optimizer step."""
    skip_at_most: int = 3
    """Iterations in a row of which engine.not_finite `skip` may leave something out; the last of them stops."""
    show_speed: bool = False
    """Show each iteration's images/s, TFLOP/s, share of the matmul rate and memory; metrics.jsonl always has them."""
    profile: int = 0
    """Iteration of which a trace and a table of the ten costliest kernels are written into the run; 0 is none."""


@dataclass(frozen=True)
class EvalConfig(SuiteSettings, DetectorSettings):
    """Measuring on held-out prompts with fixed seeds.

    An oracle that reads pictures exactly measures the `shapes` model; `suites` measure any model.
    """

    every: int = 10
    """Iterations between quick evaluations; 0 evaluates only before and after."""
    unsafe_per_category: int = 40
    """Held-out unsafe prompts per hazard category, before and after."""
    composition_per_task: int = 60
    """Held-out prompts per composition task, before and after."""
    split: ShapesSplit = "test"
    """Which held-out prompts of the shapes world: `test`, or `development` to choose settings by."""
    quick_fraction: float = 0.25
    """Share of the prompts that the evaluations in between use."""
    suites: tuple[str, ...] = ()
    """Suites of `python -m fastgrpo.evaluate` to measure by as well:
    i2p, nudity, geneval, clip-score, fid, attacks, custom.
    The groups eval.i2p, eval.q16 and so on set what they and their detectors do."""
    weights: Literal["trained", "ema"] = "trained"
    """Which weights are evaluated and pictured; `ema` needs optim.ema."""
    seed: int = 1234
    """Seed of the evaluation's noise."""
    steps: int = 0
    """DDIM steps; 0 is the rollout's number, and of `suites` their own, 50."""
    encoder: PathText = ""
    """A second encoder, in the notation of reward.encoder, that nothing is trained on; empty: none.
    Every evaluation computes `steering` with it too, as eval/held_out_*.
    Where the reward rises and this does not, the reward is being gamed."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved while training. The last iteration is always saved."""

    every: int = 10
    """Iterations between checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk, evaluated or not; 0 keeps all."""
    keep_evaluated: bool = True
    """Whether older ones that were evaluated stay too, so that the best of them can be chosen at the end."""


@dataclass(frozen=True)
class LogConfig:
    """Where metrics, pictures and tables are logged, beside metrics.jsonl, which is always written.

    A sink that is slow, down or broken holds up no training.
    """

    to: tuple[str, ...] = ("tensorboard",)
    """Sinks: `tensorboard`, in the run's folder; `wandb`, Weights & Biases; `trackio`, on this machine, or where
    TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says. Several at once, or none."""
    project: str = "fastgrpo"
    """Project that the run is shown in."""
    entity: str = ""
    """Of `wandb`: the user or team whose project it is; empty: WANDB_ENTITY, or the login's own."""
    name: str = ""
    """What the run is called there; empty: as its folder."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`offline` sends nothing anywhere: `wandb` writes files for `wandb sync`, `trackio` on this machine.
    `auto`: as WANDB_MODE says, else online."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a Stable Diffusion online with group-relative policy optimization on positive and negative prompts."""

    run: Annotated[PathText, tyro.conf.arg(aliases=["--run-folder"])] = ""
    """New or empty folder of the run; default: runs/PRESET-DATE-TIME. torchrun has a --run too: say --run-folder."""
    seed: int = 42
    """Everything random is a function of this and the iteration."""
    iterations: int = 300
    """Iterations in all, counted from the start of the run, also when resumed."""
    prompts_per_iteration: int = 32
    """Different prompts drawn in one iteration (P), over all processes together."""
    group_size: int = 16
    """Images per prompt (G); at least 2, since they are compared with each other."""
    updates_per_iteration: int = 16
    """Optimizer steps per iteration; the iteration's (sample, step) pairs are dealt out to them."""
    micro_batch: int = 4
    """(sample, step) pairs in a pass, which change no result; 0: as many as fit on CUDA, 32 on CPU."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def kl_term(self) -> bool:
        """Whether the loss has a KL term, and training a base model: also where the guard may give it a weight."""
        return self.grpo.kl > 0 or self.guard.action == "adapt"

    @property
    def rollout_steps(self) -> int:
        """Denoising steps of a rollout's samples, with and without noise."""
        steps, outside = self.rollout.steps, self.rollout.steps_outside
        return self.grpo.window + outside if self.rollout.stochastic == "window" and outside else steps

    @property
    def positives_per_iteration(self) -> int:
        """Different positive prompts drawn in one iteration."""
        return self.prompts_per_iteration - round(self.prompts_per_iteration * self.prompts.negative_fraction)


def chosen_steps(count: int, fraction: float) -> int:
    """How many of `count` steps a sample learns from; at least 1."""
    return max(1, round(count * fraction))
