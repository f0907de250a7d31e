"""Several processes that train one model: started by torchrun, each with a share of every iteration's prompts.

Every process draws the same random numbers and takes its share; gradients are summed over all. So results do not depend
on the number of processes, but for the order of sums. Without torchrun there is one process, and this does nothing.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.system.console import warn
from fastgrpo.system.errors import ConfigError
from fastgrpo.system.launch import Launch, read_launch
from fastgrpo.system.pulse import PULSE
from fastgrpo.system.watchdog import watching

_TIMEOUT = timedelta(hours=2)  # the others wait while the first one evaluates
_MEETING = timedelta(minutes=10)  # the slowest one's imports, from a file system that many read at once
_BUCKET = 2**26  # numbers that are summed in one collective
_NOTHING = torch.empty(0, dtype=torch.uint8)
_COLLECTED = 2**24  # numbers that the first process receives at a time

# torch 2.14 renamed both, and warns of the old names.
_reduce_scatter: Callable[[Tensor, Tensor], object]
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[[Tensor, Tensor], object]
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """This process, `index` of `count`; the first, 0, writes and speaks. Collectives take tensors from `device`.

    restarts: how often torchrun has started them all again, as with its --max-restarts. store: where they met.
    """

    index: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    restarts: int = 0
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        return self.index == 0

    def share(self, total: int) -> slice:
        """This process's part of `total` things in a row; the parts differ by at most one."""
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        if self.count > 1:
            with PULSE.collective():
                self._sum(tensors)

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])  # where it lies: a flat gradient is too large for a copy
                continue
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def sum_shares_(self, flat: Tensor) -> None:
        """Replace this process's share of a [n] tensor by its sum over all; the others' are then of no use."""
        if self.count > 1:
            with PULSE.collective():
                _reduce_scatter(flat[self.share(len(flat))], flat)

    def join_shares_(self, flat: Tensor) -> None:
        """Fill a [n] tensor with what every process has in its own share of it."""
        if self.count > 1:
            with PULSE.collective():
                _all_gather(flat, flat[self.share(len(flat))])

    def stack(self, tensor: Tensor) -> Tensor:
        """[count, ...]: every process's tensor, of one shape, in their order. Does not wait for the device."""
        stacked = tensor.new_empty(self.count, *tensor.shape)
        stacked[self.index] = tensor
        self.join_shares_(stacked.view(-1))
        return stacked

    def collect(self, share: Tensor) -> Tensor | None:
        """The processes' [n] tensors, equally long, one after the other in the first one's host memory; else None.

        In pieces, so that the first one's device holds 64 MB of float32 meanwhile, however many there are.
        """
        size = max(_COLLECTED // self.count, 1)
        whole = torch.empty(self.count, len(share), dtype=share.dtype) if self.first else None
        for start in range(0, len(share), size):
            piece = share[start : start + size]
            received = [torch.empty_like(piece) for _ in range(self.count)] if self.first else None
            with PULSE.collective():
                dist.gather(piece, received, dst=0)
            if whole is not None and received is not None:
                for row, part in zip(whole, received, strict=True):
                    row[start : start + size].copy_(part)
        return None if whole is None else whole.view(-1)

    def gather(self, tensor: Tensor) -> Tensor:
        """The processes' tensors one after the other, on this one's device; first dimensions may differ."""
        if self.count == 1:
            return tensor
        with PULSE.collective():
            return self._gather(tensor)

    def _gather(self, tensor: Tensor) -> Tensor:
        sent = tensor.to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        dist.all_gather(lengths, torch.tensor([len(sent)], device=self.device))
        longest = int(torch.cat(lengths).max())
        padded = sent.new_zeros(longest, *sent.shape[1:])
        padded[: len(sent)] = sent
        received = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(received, padded)
        return torch.cat([r[: int(n)] for r, n in zip(received, lengths, strict=True)]).to(tensor.device)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Give process i `sent[i]` of the rows, one process's after the other, and get `received[i]` from it likewise.

        rows: [sum(sent), ...]. Returns [sum(received), ...], on the device of `rows`.
        """
        if self.count == 1:
            return rows
        with PULSE.collective():
            given = rows.to(self.device).contiguous()
            taken = given.new_empty(sum(received), *given.shape[1:])
            dist.all_to_all_single(taken, given, list(received), list(sent))
            return taken.to(rows.device)

    def trade(self, parcels: Sequence[bytes]) -> list[bytes]:
        """Give process i the i-th parcel. Returns what each process has for this one, in their order."""
        if self.count == 1:
            return list(parcels)
        ones = [1] * self.count
        lengths = self.exchange(torch.tensor([len(parcel) for parcel in parcels]), ones, ones)
        data = torch.frombuffer(bytearray(b"".join(parcels)), dtype=torch.uint8) if any(parcels) else _NOTHING
        sizes = lengths.tolist()
        received = self.exchange(data, [len(parcel) for parcel in parcels], sizes)
        return [bytes(part.numpy()) for part in received.split(sizes)]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        with PULSE.collective():
            found = torch.tensor([number], device=self.device)
            dist.all_reduce(found, dist.ReduceOp.MAX)
            return int(found.item())

    def agree(self, text: str) -> str:
        """The first process's text, on all processes."""
        if self.count == 1:
            return text
        told = [text]
        with PULSE.collective():
            dist.broadcast_object_list(told, src=0, device=self.device)
        return told[0]

    def once(self, key: str, make: Callable[[], str]) -> str:
        """The text that the first process has made, on all processes; also those that are started again get that one.

        That is where torchrun's agent hosts the store, and lives on.
        """
        if self.store is None:
            return make()
        if self.first and not self.store.check([key]):
            self.store.set(key, make())
        return self.agree(self.store.get(key).decode() if self.first else "")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut tensors into runs, large enough to be sent at speed and small enough to be copied."""
    bucket, size = [], 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@contextmanager
def join(device: str, stuck_after: float = 0.0) -> Iterator[Ranks]:
    """Meet the processes that a launcher started beside this one, on the config's `engine.device`; alone without it.

    stuck_after: as of `watching`, of watchdog.py; 0 lets a process wait up to two hours for another.
    With CUDA each process takes the GPU of its LOCAL_RANK. Raises ConfigError where there is none for it, or where the
    environment is not a launcher's, and OSError where the others do not come.
    """
    launch = read_launch()
    if launch.count == 1:
        yield Ranks()
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and launch.local >= torch.cuda.device_count():
        raise ConfigError(
            f"torchrun started process {launch.local} on this machine, which has {torch.cuda.device_count()} CUDA "
            "devices; accepted is one process per device."
        )
    if cuda:
        torch.cuda.set_device(launch.local)
    kind, met = "nccl" if cuda else "gloo", _meet(launch)
    # torchrun's agent may serve those that it starts again from the same store, which has the dead ones' addresses.
    store = dist.PrefixStore(f"start-{launch.restarts}", met)
    dist.init_process_group(kind, store=store, rank=launch.index, world_size=launch.count, timeout=_TIMEOUT)
    try:
        meeting = torch.device("cuda", launch.local) if cuda else torch.device("cpu")
        with watching(launch, stuck_after):
            yield Ranks(dist.get_rank(), dist.get_world_size(), meeting, launch.restarts, met)
    finally:
        dist.destroy_process_group()


def _meet(launch: Launch) -> dist.Store:
    """Wait for the other processes. Returns the store that they exchange addresses through.

    In a thread, since Ctrl-C does not reach what waits inside torch. Raises OSError where they do not come.
    """
    met: list[dist.Store | Exception] = []

    def wait() -> None:
        try:
            met.append(next(dist.rendezvous("env://", timeout=_MEETING))[0])
        except Exception as error:  # raised below
            met.append(error)

    if not launch.elastic:
        minutes = _MEETING.total_seconds() / 60
        warn(
            f"WORLD_SIZE is {launch.count} and torchrun has not started this process: it waits up to {minutes:.0f} "
            f"minutes for the others at {launch.address}; unset WORLD_SIZE to go on with one"
        )
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(0.1)
    if isinstance(met[0], Exception):
        what = str(met[0]).splitlines()[0]
        raise ConnectionError(f"not all {launch.count} processes of WORLD_SIZE came to {launch.address} ({what})")
    met[0].set_timeout(_TIMEOUT)
    return met[0]
