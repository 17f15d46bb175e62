"""Active (token, latent) pairs in compressed rows."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseActs:
    """The active latents of `n` tokens: those of token i are `offsets[i]` to `offsets[i + 1]`."""

    indices: Int[Tensor, "nnz"]
    """Latent of each pair."""
    values: Float[Tensor, "nnz"]
    offsets: Int[Tensor, "n_plus_1"]
    n_latents: int

    @classmethod
    def of(cls, acts: Float[Tensor, "n n_latents"]) -> "SparseActs":
        """The non-zero entries of a dense matrix."""
        rows, indices = acts.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(acts))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(indices, acts[rows, indices], offsets, acts.shape[1])

    @property
    def n(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int[Tensor, "nnz"]:
        """Token of each pair."""
        tokens = torch.arange(self.n, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=len(self.indices))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "n_latents_plus_1"]]:
        """The order that sorts the pairs by latent, and where each latent's begin in it."""
        order = self.indices.argsort(stable=True)
        counts = torch.bincount(self.indices, minlength=self.n_latents)
        return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def dense(self) -> Float[Tensor, "n n_latents"]:
        acts = self.values.new_zeros(self.n, self.n_latents)
        return acts.index_put((self.rows, self.indices), self.values)

    def nonzero(self) -> "SparseActs":
        """Without the pairs whose value is zero (a TopK latent that ReLU clamped)."""
        return self.where(self.values != 0)

    def with_values(self, values: Float[Tensor, "nnz"]) -> "SparseActs":
        """The same pairs with other values; what was computed about the pairs is kept."""
        other = replace(self, values=values)
        for name in ("rows", "by_latent"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def where(self, kept: Bool[Tensor, "nnz"]) -> "SparseActs":
        """Only the pairs that are `kept`."""
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
        return SparseActs(
            self.indices[kept], self.values[kept], before[self.offsets], self.n_latents
        )
