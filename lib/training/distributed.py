"""Data parallelism: what the ranks of a `fit` must tell each other.

Every rank holds all weights and trains on its own part of each global batch, as many tokens as
every other rank. The sum of the ranks' gradients moves all weights alike; whatever is not a sum
over tokens (a ratio, a rank among scores) is computed from the whole batch here. No-ops in a
single process; otherwise every rank must call them.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
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


def join(device: torch.device) -> torch.device:
    """Let the ranks that `torchrun` started talk; returns this rank's device.

    A process group that is there already is used; one made here lasts as long as the process.
    """
    if device.type == "cuda" and device.index is None and world_size() > 1:
        device = torch.device("cuda", _launched("LOCAL_RANK", torch.cuda.current_device()))
        torch.cuda.set_device(device)  # where what is pickled passes
    if world_size() > 1 and not _joined():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def require_one_process(what: str) -> None:
    """Raises ValueError under `torchrun` with several ranks."""
    if world_size() > 1:
        raise ValueError(f"{what} trains in one process, got {world_size()} ranks")


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
    quotas add up.
    """
    if not _joined():
        return min(count, len(scores))
    most = count * world_size()
    own = torch.zeros(most, dtype=torch.float32, device=scores.device)  # 0: no score
    best = scores.float().topk(min(most, len(scores))).values
    own[: len(best)] = best
    everyone = gather_rows(own[None])
    edge = everyone.flatten().topk(most).values[-1]
    above, equal = (everyone > edge).sum(1), ((everyone == edge) & (everyone > 0)).sum(1)
    before = int(equal[: rank()].sum())
    left = most - int(above.sum()) - before
    return int(above[rank()]) + max(0, min(int(equal[rank()]), left))


def first(act: Callable[[], T]) -> T | None:
    """`act()` on the first rank alone; the others wait for it, and get None or its error."""
    return together(act if rank() == 0 else lambda: None)


def together(act: Callable[[], T]) -> T:
    """`act()` on every rank. An error of one is raised on all, or the others would wait for it."""
    if not _joined():
        return act()
    result = error = None
    try:
        result = act()
    except Exception as found:
        error = found
        error.add_note(f"on rank {rank()} of {world_size()}")
    sent = error
    if error is not None and type(error).__module__ != "builtins":  # it may not survive pickling
        sent = RuntimeError(f"rank {rank()} stopped with {type(error).__name__}: {error}")
    errors: list[Exception | None] = [None] * world_size()
    dist.all_gather_object(errors, sent)
    for other in errors:
        if other is not None:
            raise error or other
    return result


def gather_on_first(value: T) -> list[T]:
    """Every rank's value, pickled and sent to the first rank; the others get an empty list."""
    if not _joined():
        return [value]
    values = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
