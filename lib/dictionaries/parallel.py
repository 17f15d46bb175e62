"""Data parallelism: what the ranks of a `fit` must tell each other.

Every rank holds all weights and trains on its own part of each global batch, as many tokens as
every other rank. The sum of the ranks' gradients moves all weights alike; whatever is not a sum
over tokens (a ratio, a rank among scores) is computed from the whole batch here. In one process
each function gives back what it got, and every rank must call each of them.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.activations.source import Block, Source

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks: of the process group, or of the `torchrun` that started this process."""
    return dist.get_world_size() if _joined() else _launched("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this process is, from 0; the first writes files and shows progress."""
    return dist.get_rank() if _joined() else _launched("RANK", 0)


def _launched(name: str, otherwise: int) -> int:
    all_there = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    return int(os.environ[name]) if all_there else otherwise


_meetings = itertools.count()


@cache
def _store() -> dist.Store:
    """Where the ranks find each other; the first rank's must outlive every process group."""
    return next(dist.rendezvous("env://"))[0]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Within it the ranks that `torchrun` started can talk; yields this rank's device. A process
    group that is there already is used, and left as it was.
    """
    if device.type == "cuda" and device.index is None and world_size() > 1:
        device = torch.device("cuda", _launched("LOCAL_RANK", torch.cuda.current_device()))
        torch.cuda.set_device(device)  # where what is pickled passes
    begins = world_size() > 1 and not _joined()
    if begins:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore(f"fit {next(_meetings)}", _store())  # or it finds the last's keys
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
    try:
        yield device
    finally:
        if begins:
            dist.destroy_process_group()


def shard(stream: Iterable[Tensor]) -> Iterator[Tensor]:
    """This rank's rows of each global batch of a stream that every rank makes alike.

    Raises:
        ValueError: a batch that cannot be cut into equal parts.
    """
    for batch in stream:
        size, left = divmod(len(batch), world_size())
        if left:
            raise ValueError(f"need batches that {world_size()} ranks can share, got {len(batch)}")
        yield batch[rank() * size : (rank() + 1) * size]


class Share:
    """This rank's blocks of a source: every `world_size`-th, so that no rank makes another's."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.site_dims, self.hook_names = source.site_dims, source.hook_names
        self._blocks = range(rank(), source.n_blocks, world_size())
        self.n_blocks = len(self._blocks)
        self.fingerprint = f"{source.fingerprint} {rank()}/{world_size()}"

    def block(self, i: int) -> Block:
        return self.source.block(self._blocks[i])


def mean(value: Tensor) -> Tensor:
    """Mean over the ranks, of a mean over a rank's tokens, say; equal on all of them.

    Its gradient is that of the rank's own value. Where ranks' gradients are averaged later, this
    makes the average the gradient of the mean.
    """
    return _Mean.apply(value) if _joined() else value


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        total = value.clone()
        dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


def mean_count(count: int, device: torch.device) -> float:
    """`mean` of a number that each rank counted."""
    if not _joined():
        return float(count)
    return mean(torch.tensor(count, dtype=torch.double, device=device)).item()


def least_(tensor: Tensor) -> Tensor:
    """Each entry's minimum over the ranks, in place."""
    if _joined():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other; ranks have equally many."""
    if not _joined():
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the ranks' gradients; those of `loss / world_size()` become the global batch's."""
    if _joined():
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
            work.wait()


def quota(scores: Float[Tensor, "m"], count: int) -> int:
    """How many of all ranks' `count · world_size()` largest scores are among these, the rank's own.

    Scores are positive. Of equal scores at the edge, those of lower ranks go first, so that the
    quotas add up. A radix selection: as integers the bits of positive floats keep their order, so
    two histograms, of the upper and of the lower 16 bits, find the edge whatever the number of
    scores.
    """
    if not _joined():
        return min(count, len(scores))
    bits = scores.float().view(torch.int32)
    upper, lower = bits >> 16, bits & 0xFFFF
    missing = count * world_size()
    edge, above, missing, _ = _edge(upper, missing)
    _, still_above, missing, equal = _edge(lower[upper == edge], missing)
    by_rank = gather_rows(equal[None]).tolist()
    mine = max(0, min(by_rank[rank()], missing - sum(by_rank[: rank()])))
    return above + still_above + mine


def _edge(digits: Int[Tensor, "m"], count: int) -> tuple[int, int, int, Int[Tensor, ""]]:
    """The digit at which all ranks' `count` largest end (0 if there are fewer); how many of this
    rank's are larger, how many of `count` are then missing, how many of this rank's are equal."""
    own = torch.bincount(digits, minlength=1 << 16)
    everywhere = own.clone()
    dist.all_reduce(everywhere)
    larger = everywhere.flip(0).cumsum(0).flip(0) - everywhere
    edge = int((larger < count).nonzero()[0])
    return edge, int(own[edge + 1 :].sum()), count - int(larger[edge]), own[edge]


def first(act: Callable[[], T]) -> T | None:
    """`act()` on the first rank alone; the others wait for it, and get None or its error."""
    return together(act if rank() == 0 else lambda: None)


def together(act: Callable[[], T]) -> T:
    """`act()` on every rank. An error of one is raised on all, or the others would wait for it."""
    if not _joined():
        return act()
    result, error = _attempt(act)
    _raise_everywhere(error)
    return result


def next_together(read: Callable[[], Tensor], device: torch.device) -> Tensor:
    """`together` for the next batch, with less to tell.

    Raises:
        ValueError: the ranks' batches differ in size.
    """
    if not _joined():
        return read()
    batch, error = _attempt(read)
    size = torch.tensor([-1 if error else len(batch)], device=device)
    sizes = gather_rows(size).tolist()
    if -1 in sizes:
        _raise_everywhere(error)
    if len(set(sizes)) > 1:
        raise ValueError(f"need batches of the same size on every rank, got {sizes} tokens")
    return batch


def gather_on_first(value: T) -> list[T]:
    """Every rank's value, pickled and sent to the first rank; the others get an empty list."""
    if not _joined():
        return [value]
    values = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        error.add_note(f"on rank {rank()} of {world_size()}")
        return None, error


def _raise_everywhere(error: Exception | None) -> None:
    """Raise, on every rank, its own error or else the first that another rank has."""
    sent = error
    if error is not None and type(error).__module__ != "builtins":  # it may not survive pickling
        sent = RuntimeError(f"rank {rank()} stopped with {type(error).__name__}: {error}")
    errors: list[Exception | None] = [None] * world_size()
    dist.all_gather_object(errors, sent)
    for found in errors:
        if found is not None:
            raise error or found
