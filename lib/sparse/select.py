"""Which entries of a large matrix are large."""

import math

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int
from torch import Tensor


def largest_of_rows(matrix: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Columns of the k largest entries of each row, in no order.

    They lie in the k groups of columns with the largest maxima. A group's columns are as far apart
    as they can be, so that its maximum is taken along whole rows of memory. Of equal entries any
    may be taken, as in `torch.topk`.
    """
    matrix = matrix.contiguous()
    n, m = matrix.shape
    size = 2 ** round(math.log2(max(1.0, m / k)) / 2)  # what makes both steps equally long
    while m % size:
        size //= 2
    if size < 4 or not n:
        return _top(matrix, k)
    groups = _top(matrix.view(n, size, m // size).amax(1), k)
    members = torch.arange(size, device=matrix.device) * (m // size)
    candidates = (groups[:, None, :] + members[:, None]).view(n, size * k)
    return candidates.gather(1, _top(matrix.gather(1, candidates), k))


def _top(matrix: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """`largest_of_rows` in one step."""
    return matrix.topk(k, dim=1, sorted=False).indices


def largest(values: Float[Tensor, "m"], count: int) -> Int[Tensor, "count"]:
    """Places of the `count` largest values, ascending; of equal ones, any."""
    return values.topk(count, sorted=False).indices.sort().values


def places_of(mask: Bool[Tensor, "n m"]) -> Int[Tensor, "nnz"]:
    """Where a mask is true, counted along its rows; ascending."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times as fast as torch


def places_above(
    matrix: Float[Tensor, "n m"],
    bound: Float[Tensor, "m"] | Float[Tensor, ""] | Float[Tensor, "n 1"],
) -> Int[Tensor, "nnz"]:
    """Where entries exceed the bound of their column or row, counted along the rows; ascending.

    In bfloat16 all that may have exceeded it before they were rounded.
    """
    if matrix.dtype != torch.bfloat16 and matrix.device.type == "cpu":
        above = np.greater(matrix.detach().numpy(), bound.detach().numpy())  # faster than torch
        return torch.from_numpy(np.flatnonzero(above))
    if matrix.dtype != torch.bfloat16:
        return places_of(matrix > bound)
    bound = bound.bfloat16()
    if matrix.device.type != "cpu" or bound.signbit().any():
        return places_of(matrix >= bound)
    return torch.from_numpy(np.flatnonzero(np.greater_equal(_bits(matrix), _bits(bound))))


def bound_of_largest(matrix: BFloat16[Tensor, "n m"], k: int) -> Float[Tensor, "n"]:
    """Not above the k-th largest entry of each row before it was rounded, if that is positive.

    It is that of the maxima of groups of columns; with at least 4 k groups little is lost by it.
    """
    m = matrix.shape[1]
    size = min(16, max(1, m // (4 * k)))
    groups = _bits(matrix)[:, : m // size * size].reshape(len(matrix), size, m // size).max(1)
    smallest = np.partition(groups, m // size - k, axis=1)[:, m // size - k]
    return torch.from_numpy(smallest).view(torch.bfloat16).float() * (1 - 2.0**-8)


def _bits(matrix: BFloat16[Tensor, "*shape"]) -> np.ndarray:
    """Integers that are ordered as the positive entries are, and negative as the others."""
    return matrix.detach().view(torch.int16).numpy()


def largest_of_runs(
    values: Float32[Tensor, "nnz"], offsets: Int[Tensor, "n_plus_1"], k: int
) -> Int[Tensor, "few"]:
    """Places of the k largest values (all, where there are fewer) of each run, ascending.

    Run i is from `offsets[i]` to `offsets[i + 1]`; on a CPU.
    """
    if not len(values):
        return offsets.new_zeros(0)
    starts, lengths = offsets.numpy(), offsets.diff().numpy()
    bits = values.detach().numpy().view(np.int32)
    bits = bits ^ (bits >> 31 & 0x7FFFFFFF)  # integers that are ordered as the values are
    keys = (np.repeat(np.arange(len(lengths)), lengths) << 32) + bits
    least = np.sort(keys).take(np.maximum(starts[:-1], starts[1:] - k), mode="clip")
    kept = torch.from_numpy(keys >= np.repeat(least, lengths)).nonzero()[:, 0]
    if len(kept) == np.minimum(lengths, k).sum():
        return kept
    order = np.argsort(keys)  # some are equal
    first = np.repeat(starts[1:] - k, lengths)
    return torch.from_numpy(np.sort(order[np.arange(len(order)) >= first]))
