"""Which entries of a large matrix are large: found by looking at groups of them first.

A group of columns is as far apart as it can be, so that a maximum over it runs along whole rows of
memory; most groups of a sparse code hold nothing, and are read only once.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def largest_of_rows(matrix: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Columns of the k largest entries of each row, in no order.

    Exact: the k largest lie in the k groups with the largest maxima. With ties at the k-th place,
    which of the equal ones are taken is open, as in `torch.topk`.
    """
    n, m = matrix.shape
    size = 2 ** round(math.log2(max(1.0, m / k)) / 2)  # what makes both steps equally long
    while m % size:
        size //= 2
    if size < 4 or not n:
        return matrix.topk(k, dim=1, sorted=False).indices
    maxima = matrix.view(n, size, m // size).amax(1)
    groups = largest_of_rows(maxima, k)
    members = torch.arange(size, device=matrix.device) * (m // size)
    candidates = (groups[:, None, :] + members[:, None]).view(n, size * k)
    chosen = largest_of_rows(matrix.gather(1, candidates), k)
    return candidates.gather(1, chosen)


def places_above(
    matrix: Float[Tensor, "n m"], bound: Float[Tensor, "m"] | Float[Tensor, ""]
) -> Int[Tensor, "nnz"]:
    """Where entries exceed the bound of their column, counted along the rows; rows ascend."""
    n, m = matrix.shape
    size = math.gcd(m, 8)
    width = m // size
    bound = bound.expand(m).view(size, width)
    hits = true_places(matrix.view(n, size, width).amax(1) > bound.amin(0))
    if size == 1 or len(hits) * 4 * size > n * m:
        return true_places(matrix > bound.flatten())
    rows, columns = hits // width, hits % width
    members = torch.arange(size, device=matrix.device) * width
    places = (rows * m + columns)[:, None] + members
    return places[matrix.take(places) > bound.T[columns]]


def true_places(mask: Bool[Tensor, "n m"]) -> Int[Tensor, "nnz"]:
    """Where a mask is true, counted along its rows.

    Eight entries at a time are looked at as one integer, which finds the few true ones of a large
    mask in a third of the time. With many, looking at each is faster.
    """
    flat = mask.flatten()
    if len(flat) % 8 == 0:
        eights = flat.view(torch.int64).nonzero()
        if len(eights) * 8 < len(flat) // 8:
            places = eights * 8 + torch.arange(8, device=mask.device)
            return places[flat[places]]
    return flat.nonzero()[:, 0]
