"""Which entries of a large matrix are large; by numpy, where torch is slower on a CPU."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
    if matrix.device.type != "cpu" or matrix.dtype == torch.bfloat16 or not len(matrix):
        return matrix.topk(k, dim=1, sorted=False).indices
    places = np.argpartition(matrix.detach().numpy(), matrix.shape[1] - k, axis=1)
    return torch.from_numpy(places[:, matrix.shape[1] - k :])


def places_above(
    matrix: Float[Tensor, "n m"], bound: Float[Tensor, "m"] | Float[Tensor, ""]
) -> Int[Tensor, "nnz"]:
    """Where entries exceed the bound of their column, counted along the rows; ascending."""
    if matrix.device.type != "cpu" or matrix.dtype == torch.bfloat16:  # which numpy does not have
        return true_places(matrix > bound)
    above = np.greater(matrix.detach().numpy(), bound.detach().numpy())  # five times torch's speed
    return torch.from_numpy(np.flatnonzero(above))


def true_places(mask: Bool[Tensor, "n m"]) -> Int[Tensor, "nnz"]:
    """Where a mask is true, counted along its rows; ascending."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def largest(values: Float[Tensor, "m"], count: int) -> Int[Tensor, "count"]:
    """Places of the `count` largest values, ascending; of equal ones, any."""
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return values.topk(count, sorted=False).indices.sort().values
    places = np.argpartition(values.detach().numpy(), len(values) - count)[len(values) - count :]
    return torch.from_numpy(np.sort(places))


def dots_of_rows(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    """The product of each row of `a` with its row of `b`; without a graph."""
    if a.device.type != "cpu" or a.dtype == torch.bfloat16:
        return torch.linalg.vecdot(a.detach(), b.detach())
    return torch.from_numpy(np.vecdot(a.detach().numpy(), b.detach().numpy()))
