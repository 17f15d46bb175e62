"""Active (token, latent) pairs in compressed rows."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def starts_of(counts: Int[Tensor, "m"]) -> Int[Tensor, "m_plus_1"]:
    """Where runs of these lengths begin, and where the last ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass(frozen=True, eq=False)
class SparseActs:
    """The active latents of `n` tokens: those of token i are `offsets[i]` to `offsets[i + 1]`."""

    indices: Int[Tensor, "nnz"]
    """Latent of each pair."""
    values: Float[Tensor, "nnz"]
    offsets: Int[Tensor, "n_plus_1"]
    n_latents: int
    _known: dict = field(default_factory=dict, repr=False)  # of the pairs, whatever their values

    @classmethod
    def of(cls, acts: Float[Tensor, "n n_latents"]) -> "SparseActs":
        """The non-zero entries of a dense matrix."""
        rows, indices = acts.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(acts))
        return cls(indices, acts[rows, indices], starts_of(counts), acts.shape[1])

    @classmethod
    def joined(cls, parts: list["SparseActs"]) -> "SparseActs":
        """The tokens of all parts, one after the other."""
        counts = torch.cat([part.offsets.diff() for part in parts])
        indices = torch.cat([part.indices for part in parts])
        values = torch.cat([part.values for part in parts])
        return cls(indices, values, starts_of(counts), parts[0].n_latents)

    @property
    def n(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows(self) -> Int[Tensor, "nnz"]:
        """Token of each pair."""
        if "rows" not in self._known:
            tokens = torch.arange(self.n, device=self.offsets.device)
            repeats = self.offsets.diff()
            self._known["rows"] = tokens.repeat_interleave(repeats, output_size=len(self.indices))
        return self._known["rows"]

    @property
    def by_latent(self) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "n_latents_plus_1"]]:
        """The order that sorts the pairs by latent, and where each latent's begin in it."""
        if "by_latent" not in self._known:
            order = self.indices.int().argsort(stable=True)  # half the time of 64 bits
            counts = torch.bincount(self.indices, minlength=self.n_latents)
            self._known["by_latent"] = (order, starts_of(counts))
        return self._known["by_latent"]

    @property
    def rows_by_latent(self) -> Int[Tensor, "nnz"]:
        """Token of each pair, in the order that sorts them by latent."""
        if "rows_by_latent" not in self._known:
            self._known["rows_by_latent"] = self.rows.index_select(0, self.by_latent[0])
        return self._known["rows_by_latent"]

    def dense(self) -> Float[Tensor, "n n_latents"]:
        acts = self.values.new_zeros(self.n, self.n_latents)
        return acts.index_put((self.rows, self.indices), self.values)

    def l0(self) -> Float[Tensor, "n"]:
        """Positive values of each token, counted."""
        return torch.bincount(self.rows[self.values > 0], minlength=self.n).to(self.values.dtype)

    def nonzero(self) -> "SparseActs":
        """Without the pairs whose value is zero (a TopK latent that ReLU clamped)."""
        return self.where(self.values != 0)

    def with_values(self, values: Float[Tensor, "nnz"]) -> "SparseActs":
        """The same pairs with other values; what was computed about the pairs is kept."""
        return replace(self, values=values)

    def where(self, kept: Bool[Tensor, "nnz"]) -> "SparseActs":
        """Only the pairs that are `kept`."""
        return self.at(kept.nonzero()[:, 0])

    def tokens(self, kept: Bool[Tensor, "n"]) -> "SparseActs":
        """Only the tokens that are `kept`."""
        pairs, counts = kept[self.rows], self.offsets.diff()[kept]
        return SparseActs(
            self.indices[pairs], self.values[pairs], starts_of(counts), self.n_latents
        )

    def at(self, places: Int[Tensor, "few"]) -> "SparseActs":
        """Only the pairs at these places, which ascend."""
        offsets = torch.searchsorted(places, self.offsets)
        parts = (part.index_select(0, places) for part in (self.indices, self.values))
        return SparseActs(*parts, offsets, self.n_latents)
