"""(sample, step) pairs, the units of learning, and how an iteration's are dealt out to its optimizer steps.

Where groups branch (`fastgrpo.grpo.branches`), one sample stands for all that are on the path of a step, and pairs that
start from one latent are siblings: they stay together, since one pass of the UNet serves them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.grpo.branches import Tree, tree_of
from fastgrpo.grpo.steps import steps_of_samples, trained_steps
from fastgrpo.schedule import Schedule
from fastgrpo.settings.schema import TrainConfig
from fastgrpo.system.distributed import Ranks


@dataclass(frozen=True)
class Pairs:
    """N pairs, on the policy's device. sample: [N] int64, in 0..B-1. step: [N] int64, the position in the schedule.

    families: (how many, how large) one after the other: neighbouring pairs that start from one latent. () is N of 1.
    """

    sample: Tensor
    step: Tensor
    families: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return self.sample.shape[0]

    def __getitem__(self, chosen: Tensor | slice) -> "Pairs":
        """Some of the pairs, each on its own."""
        return Pairs(self.sample[chosen], self.step[chosen])

    @property
    def passes(self) -> int:
        """How many latents the pairs start from, and so passes of the UNet that learn from them."""
        return sum(count for count, _ in self.families) or len(self)

    @property
    def siblings(self) -> int:
        """How large all the families are. Raises ValueError where they differ, as they do not in a micro-batch."""
        sizes = {size for _, size in self.families} or {1}
        if len(sizes) > 1:
            raise ValueError(f"families of {sorted(sizes)} pairs are in one micro-batch")
        return sizes.pop()

    def runs(self) -> list["Pairs"]:
        """Pairs of equally large families together, in their order."""
        runs, start = [], 0
        for count, size in self.families or ((len(self), 1),):
            part = self[start : start + count * size]
            runs.append(Pairs(part.sample, part.step, ((count, size),) if size > 1 else ()))
            start += count * size
        return [run for run in runs if len(run)]

    def split(self, size: int) -> list["Pairs"]:
        """Nearly equal micro-batches of at most `size` families, which are equally large in each.

        Not full ones and a rest: BLAS on the CPU sums very few rows in another order, which would move the rest's
        ratios off 1 by a few 1e-7.
        """
        parts = []
        for run in self.runs():
            bounds = torch.arange(len(run) // run.siblings).tensor_split(-(-len(run) // (size * run.siblings)))
            parts += [run._some_families(int(some[0]), int(some[-1]) + 1) for some in bounds]
        return parts

    def blocks(self, size: int) -> list["Pairs"]:
        """Micro-batches of exactly `size` families, which are equally large in each, and a rest of each run."""
        return [
            run._some_families(start, min(start + size, len(run) // run.siblings))
            for run in self.runs()
            for start in range(0, len(run) // run.siblings, size)
        ]

    def _some_families(self, start: int, stop: int) -> "Pairs":
        size = self.siblings
        part = self[start * size : stop * size]
        return Pairs(part.sample, part.step, ((stop - start, size),) if size > 1 else ())


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step learns from.

    size: pairs that the loss is averaged over, with those of flat groups, on all processes. computed: how many of them
    are computed. pairs: this process's share, numbered by its own B samples, and those of other processes' samples from
    B on, as they are received.
    """

    size: int
    computed: int
    pairs: Pairs


@dataclass(frozen=True)
class Moves:
    """Pairs that another process learns from than the one that drew them.

    sent: this process's, by its own samples, those for one process after the other. received: the M that come to it,
    numbered from B on, in the same order. to, come: how many for, and from, each process. total: on all processes.
    """

    sent: Pairs
    received: Pairs
    to: list[int]
    come: list[int]
    total: int


def deal(
    schedule: Schedule,
    learned: Tensor,
    flat: Tensor,
    config: TrainConfig,
    iteration: int,
    generator: torch.Generator,
    ranks: Ranks,
    kl: bool = False,
) -> tuple[list[OptimizerStep], Moves]:
    """Shuffle all pairs and deal them into nearly equal parts, so that every optimizer step sees a mix of samples.

    learned: [P, G] bool and flat: [P] bool, of all processes' prompts; all deal alike, then each takes its own pairs,
    and of processes with more than the others in a step some of theirs: nobody waits for more than one family.
    kl: whether the KL term has a weight: then pairs of flat groups have a gradient too.
    Raises ConfigError when no step can be trained.
    """
    steps, tree = trained_steps(schedule, config.grpo, iteration), tree_of(schedule, config)
    shuffled = [
        _shuffled(learned, some, tree, config, generator)
        for some in ([steps] if tree is None else _by_width(steps, tree))
    ]
    # Each kind of family is dealt out alone, so that optimizer steps are as large as each other.
    parts = [[shuffle.pick(part) for part in torch.arange(len(shuffle)).tensor_split(config.updates_per_iteration)]
             for shuffle in shuffled]  # fmt: skip
    dealt = [_Families.join(kinds) for kinds in zip(*parts, strict=True)]
    chosen = [every.pick(~flat.cpu()[every.sample // config.group_size] | kl) for every in dealt]
    drawn = learned.numel() // ranks.count  # samples of each process
    drawer = [part.sample // drawn for part in chosen]
    learner = [spread_evenly(of, ranks.count) for of in drawer]

    everything, by, to = _Families.join(chosen), torch.cat(drawer), torch.cat(learner)
    moving = (to != by).nonzero().flatten()
    sent, received = moving[by[moving] == ranks.index], moving[to[moving] == ranks.index]
    sent, received = sent[to[sent].argsort(stable=True)], received[by[received].argsort(stable=True)]
    # By this process's own samples; what it receives is numbered behind them, pair by pair.
    place = replace(everything, sample=everything.sample - ranks.index * drawn)
    sizes = place.size[received]
    place.sample[received] = drawn + sizes.cumsum(0) - sizes
    place.apart[received] = 1
    device, start, steps_dealt = schedule.timesteps.device, 0, []
    for every, part, of in zip(dealt, chosen, learner, strict=True):
        mine = start + (of == ranks.index).nonzero().flatten()
        start += len(part)
        pairs = place.pick(mine).pairs(device)
        steps_dealt.append(OptimizerStep(int(every.size.sum()), int(part.size.sum()), pairs))

    def count(of: Tensor, families: Tensor) -> list[int]:
        pairs = place.size[families].double()
        return torch.bincount(of[families], weights=pairs, minlength=ranks.count).long().tolist()

    sent_pairs, received_pairs = (place.pick(some).pairs(device) for some in (sent, received))
    total = int(place.size[moving].sum())
    return steps_dealt, Moves(sent_pairs, received_pairs, count(to, sent), count(by, received), total)


@dataclass(frozen=True)
class _Families:
    """F families of pairs that start from one latent, on the CPU, int64 [F] each.

    sample: that of the first pair. step: its position in the schedule. size: how many pairs. apart: by how much their
    samples differ from one pair to the next.
    """

    sample: Tensor
    step: Tensor
    size: Tensor
    apart: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    def pick(self, chosen: Tensor) -> "_Families":
        return _Families(self.sample[chosen], self.step[chosen], self.size[chosen], self.apart[chosen])

    @classmethod
    def join(cls, parts: Sequence["_Families"]) -> "_Families":
        return cls(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("sample", "step", "size", "apart"))
        )

    def pairs(self, device: torch.device) -> Pairs:
        """All their pairs. Families that are equally large are neighbours already."""
        first = (self.size.cumsum(0) - self.size).repeat_interleave(self.size)
        number = torch.arange(len(first)) - first  # in its family
        sample = self.sample.repeat_interleave(self.size) + number * self.apart.repeat_interleave(self.size)
        sizes, counts = self.size.unique_consecutive(return_counts=True)
        families = tuple(zip(counts.tolist(), sizes.tolist(), strict=True)) if (self.size > 1).any() else ()
        return Pairs(sample.to(device), self.step.repeat_interleave(self.size).to(device), families)


def _by_width(steps: Tensor, tree: Tree) -> list[Tensor]:
    """The steps, those with the widest branching first and those of one width together."""
    widths = torch.tensor([tree.width(step) for step in steps.tolist()])
    return [steps[widths == width] for width in widths.unique().flip(0)]


def _shuffled(
    learned: Tensor, steps: Tensor, tree: Tree | None, config: TrainConfig, generator: torch.Generator
) -> _Families:
    """All families of these steps in a random order, once in each epoch. Of a tree all its steps have one width."""
    fraction, epochs = config.grpo.step_fraction, config.grpo.epochs
    if tree is None:
        samples = learned.flatten().nonzero().flatten().cpu()
        chosen = steps_of_samples(steps, len(samples), fraction, generator)
        count = chosen.numel()
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        row, column = order % len(samples), order // len(samples) % chosen.shape[1]
        ones = torch.ones_like(order)
        return _Families(samples[row], chosen[row, column], ones, ones.clone())
    parts = []
    for step in steps.tolist():
        before, after = tree.counts[step], tree.counts[step + 1]
        groups = learned.all(dim=1).nonzero().flatten().cpu()  # a group is left out as a whole
        sample = (groups[:, None] * tree.group_size + torch.arange(before) * (tree.group_size // before)).flatten()
        numbers = [step, after // before, tree.group_size // after]
        parts.append(_Families(sample, *(torch.full_like(sample, number) for number in numbers)))
    families = _Families.join(parts)
    order = torch.cat([torch.randperm(len(families), generator=generator) for _ in range(epochs)])
    return families.pick(order)


def spread_evenly(drawer: Tensor, count: int) -> Tensor:
    """Who of `count` processes learns from each pair: as many pairs each, or one more, and as few moved as can be.

    drawer: [N] int64, who has drawn it. Returns [N] int64. A process with too many gives away its last ones.
    """
    have = torch.bincount(drawer, minlength=count)
    least, more = divmod(len(drawer), count)
    wanted = torch.full((count,), least)
    wanted[have.argsort(descending=True, stable=True)[:more]] += 1
    number = torch.empty_like(drawer)  # of each pair among its process's
    number[drawer.argsort(stable=True)] = torch.arange(len(drawer)) - (have.cumsum(0) - have).repeat_interleave(have)
    learner = drawer.clone()
    learner[number >= wanted[drawer]] = torch.arange(count).repeat_interleave((wanted - have).clamp(min=0))
    return learner
