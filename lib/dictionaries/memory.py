"""Large matrices that are used again at every training step."""

from collections import defaultdict

import torch
from torch import Tensor

BLOCK = (2**18, 2**27)
"""Numbers of a matrix that are handled at a time: in a CPU's cache, and on a GPU."""


def rows_in_cache(matrix: Tensor) -> int:
    """How many of its rows fit all threads' caches: several passes over them read memory once."""
    threads = 1 if matrix.is_cuda else torch.get_num_threads()
    return max(1, threads * BLOCK[matrix.is_cuda] // matrix.shape[1])


def product_dtype(matrix: Tensor) -> torch.dtype:
    """In which its products are taken: autocast's, or its own."""
    kind = matrix.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else matrix.dtype


class Memory:
    """Hands matrices out and takes them back.

    On a CPU, fresh pages cost as much as a fifth of the products that fill them; torch's own
    allocator keeps what a GPU frees.
    """

    def __init__(self) -> None:
        self._free: dict[tuple, list[Tensor]] = defaultdict(list)
        self._lent: set[int] = set()  # by address: a gradient is another tensor in the same place
        # Linux hands freed blocks back to the system until it has seen one as large as this freed;
        # from then on it keeps the small ones of every step
        torch.empty(31 * 2**20, dtype=torch.uint8)

    def take(self, n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix `[n m]` with anything in it; it is the caller's until given back."""
        free = self._free[n, m, dtype, device]
        matrix = free.pop() if free else torch.empty(n, m, dtype=dtype, device=device)
        self._lent.add(matrix.data_ptr())
        return matrix

    def give(self, matrix: Tensor | None) -> None:
        """Take back what was lent and nobody reads any more; two of a shape are kept."""
        if matrix is None or matrix.is_cuda or matrix.data_ptr() not in self._lent:
            return
        self._lent.remove(matrix.data_ptr())
        free = self._free[(*matrix.shape, matrix.dtype, matrix.device)]
        if len(free) < 2:
            free.append(matrix)
