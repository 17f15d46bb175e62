"""Which latents fired on which token of a corpus: a sparse token × latent matrix and its text."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.activations.source import Block
from lib.data.corpus import Corpus
from lib.runtime import atomic_file
from lib.sparse.acts import SparseActs, starts_of

KIND = "latent record 1"


class Columns(NamedTuple):
    """The matrix by latent: entries of latent j are `offsets[j]:offsets[j + 1]`."""

    tokens: Tensor
    """Ascending within a latent."""
    values: Tensor
    offsets: Tensor


class Context(NamedTuple):
    """Text round a token: its token ids, and which of them is the token."""

    ids: Tensor
    at: int


@dataclass(frozen=True, eq=False)
class LatentRecord:
    """Active latents of n tokens, by token (CSR), and the whole text that the tokens stand in."""

    indices: Int[Tensor, " nnz"]
    """Latent of each active pair."""
    values: Float[Tensor, " nnz"]
    offsets: Int[Tensor, " n_plus_1"]
    """Pairs of token i are `offsets[i]:offsets[i + 1]`."""
    n_latents: int
    ids: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]
    """Row of the corpus."""
    positions: Int[Tensor, " n"]
    """Place in the row."""
    texts: Int[Tensor, " n_text"]
    """Token ids of all rows, one after the other, those too that gave no latents."""
    text_offsets: Int[Tensor, " n_rows_plus_1"]
    concepts: Int[Tensor, " n"] | None = None
    """Bit masks of the concepts that each token carries, where the corpus knows them."""

    def __post_init__(self) -> None:
        n, nnz = len(self.ids), len(self.indices)
        for name, size in (("values", nnz), ("rows", n), ("positions", n), ("concepts", n)):
            x = getattr(self, name)
            if x is not None and len(x) != size:
                raise ValueError(f"need {size} {name}, got {len(x)}")
        for name, offsets, end, size in (
            ("offsets", self.offsets, nnz, n + 1),
            ("text_offsets", self.text_offsets, len(self.texts), len(self.text_offsets)),
        ):
            if len(offsets) != size or size == 0 or (offsets[0], offsets[-1]) != (0, end):
                raise ValueError(f"need {name} of length {size} from 0 to {end}, got {offsets}")
            if (offsets.diff() < 0).any():
                raise ValueError(f"need {name} that never fall, got {offsets}")
        for name, index, below in (
            ("indices", self.indices, self.n_latents),
            ("rows", self.rows, self.n_rows),
        ):
            if len(index) and (index.min() < 0 or index.max() >= below):
                raise ValueError(
                    f"need {name} in 0..{below - 1}, got {index.min()} to {index.max()}"
                )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_rows(self) -> int:
        return len(self.text_offsets) - 1

    @property
    def acts(self) -> SparseActs:
        """The matrix alone."""
        return SparseActs(self.indices, self.values, self.offsets, self.n_latents)

    @functools.cached_property
    def by_latent(self) -> Columns:
        """The matrix by latent; sorted at the first call, then kept."""
        acts = self.acts
        order, starts = acts.by_latent
        return Columns(acts.rows_by_latent, self.values[order], starts)

    def active(self, latent: int) -> tuple[Int[Tensor, " fired"], Float[Tensor, " fired"]]:
        """The tokens on which `latent` fires, and its values there."""
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"need a latent in 0..{self.n_latents - 1}, got {latent}")
        tokens, values, offsets = self.by_latent
        here = slice(int(offsets[latent]), int(offsets[latent + 1]))
        return tokens[here], values[here]

    def firing_rate(self) -> Float[Tensor, " n_latents"]:
        """Share of tokens on which each latent fires."""
        return self.by_latent.offsets.diff() / max(len(self), 1)

    def top_examples(
        self, latent: int, n: int, *, lowest: bool = False
    ) -> Int[Tensor, " at_most_n"]:
        """Tokens with the largest values, at most one a row, largest first.

        Args:
            lowest: those with the smallest values instead, smallest first.
        """
        tokens, values = self.active(latent)
        values = -values if lowest else values
        size = 0
        while True:  # a few candidates give `n` rows, mostly: sort no more than those
            size = max(8 * size, 16 * n)
            found = self._distinct(tokens[_largest(values, size)])[:n]
            if len(found) == n or size >= len(values):
                return found

    def quantile_examples(self, latent: int, n_quantiles: int, n: int) -> list[Tensor]:
        """Tokens from each quantile of the values at which `latent` fires, the highest first.

        Within a quantile at most one token a row, evenly spaced over those that are there, so a
        quantile may give fewer than `n`; a dead latent gives none.
        """
        tokens, values = self.active(latent)
        ordered = tokens[values.sort(descending=True, stable=True).indices]
        parts = [self._distinct(part) for part in ordered.tensor_split(n_quantiles)]
        return [part[_spread(len(part), n)] for part in parts]

    def histogram(
        self, latent: int, bins: int
    ) -> tuple[Int[Tensor, " bins"], Float[Tensor, " bins_plus_1"]]:
        """Counts of the values at which `latent` fires, and the bins' edges, from 0 on."""
        values = self.active(latent)[1].double().numpy()
        span = (values.min(initial=0.0), values.max(initial=0.0))
        counts, edges = np.histogram(values, bins=bins, range=span)
        return torch.from_numpy(counts), torch.from_numpy(edges)

    def context(self, token: int, before: int, after: int) -> Context:
        """Up to so many tokens of the same row before and after `token`."""
        start, end = self.text_offsets[self.rows[token] :][:2].tolist()
        at = start + int(self.positions[token])
        first = max(start, at - before)
        return Context(self.texts[first : min(end, at + after + 1)], at - first)

    def row_text(self, row: int) -> Int[Tensor, " length"]:
        """Token ids of a row of the corpus."""
        return self.texts[self.text_offsets[row] : self.text_offsets[row + 1]]

    def row_values(self, latent: int, row: int) -> Float[Tensor, " length"]:
        """Values of `latent` over a row's text: 0 where it did not fire or was not asked."""
        tokens, values = self.active(latent)
        order, starts = self._by_row
        asked = order[starts[row] : starts[row + 1]]
        places = torch.searchsorted(tokens, asked)
        fired = places < len(tokens)
        fired[fired.clone()] = tokens[places[fired]] == asked[fired]
        dense = torch.zeros(len(self.row_text(row)))
        dense[self.positions[asked[fired]].long()] = values[places[fired]]
        return dense

    def save(self, path: str | Path) -> None:
        """One safetensors file, complete or absent."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "n_latents"}
        tensors = {name: x.contiguous() for name, x in tensors.items() if x is not None}
        about = {"kind": KIND, "n_latents": str(self.n_latents)}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, about)

    @classmethod
    def load(cls, path: str | Path) -> "LatentRecord":
        """Raises ValueError for a file that is damaged or holds something else."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("kind") != KIND:
                    raise ValueError(f"need a file of kind {KIND!r}, got {about.get('kind')!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(n_latents=int(about["n_latents"]), **tensors)
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no complete latent record: {error}") from error

    @functools.cached_property
    def _by_row(self) -> tuple[Tensor, Tensor]:
        """The tokens sorted by row, ascending within one, and where each row's begin."""
        counts = torch.bincount(self.rows, minlength=self.n_rows)
        return self.rows.argsort(stable=True), starts_of(counts)

    def _distinct(self, tokens: Tensor) -> Tensor:
        """The first token of each row, in the order given."""
        n = len(tokens)
        first = torch.full((self.n_rows,), n)
        first.scatter_reduce_(0, self.rows[tokens].long(), torch.arange(n), "amin")
        return tokens[first[first < n].sort().values]


def _largest(values: Tensor, n: int) -> Tensor:
    """Indices of at least the `n` largest values, largest first; equal ones keep their order."""
    kept = torch.arange(len(values))
    if n < len(values):
        kept = (values >= values.topk(n, sorted=False).values.min()).nonzero()[:, 0]
    return kept[values[kept].sort(descending=True, stable=True).indices]


def _spread(length: int, n: int) -> Tensor:
    """At most `n` indices, evenly spaced over `length`."""
    return torch.linspace(0, max(length - 1, 0), min(n, length)).round().long()


class Part(NamedTuple):
    """Latents of some tokens, and which tokens of a corpus these are."""

    acts: SparseActs
    ids: Tensor
    rows: Tensor
    positions: Tensor


@torch.no_grad()
def collect(
    encode: Callable[[Tensor], SparseActs], blocks: Iterable[Block], corpus: Corpus
) -> LatentRecord:
    """Encode every block once and keep the active latents, on the CPU.

    Args:
        encode: activations `[n d_in]` to latents, such as a dictionary's `encode_sparse`.
        blocks: activations of `corpus`'s tokens, in any order; tokens may be missing.

    Raises:
        ValueError: no tokens at all; blocks of another corpus; `encode` gave another number of
            tokens or changed its number of latents.
    """
    parts = (Part(encode(b.acts), b.ids, b.rows, b.positions) for b in blocks)
    return assemble(parts, corpus)


def assemble(parts: Iterable[Part], corpus: Corpus) -> LatentRecord:
    """One record of all `parts`, in their order, on the CPU.

    Raises:
        ValueError: as `collect`.
    """
    kept: list[tuple[Tensor, ...]] = []
    n_latents = None
    for i, part in enumerate(parts):
        acts = part.acts
        n_latents = acts.n_latents if n_latents is None else n_latents
        rows, positions = _checked(i, part, n_latents, corpus)
        pairs = (acts.indices.int(), acts.values.float(), acts.offsets.diff())
        kept.append(tuple(x.cpu() for x in (*pairs, part.ids.int(), rows.int(), positions.int())))
    if not sum(len(part[3]) for part in kept):
        raise ValueError("need at least one token to record, got none")
    indices, values, counts, ids, rows, positions = map(torch.cat, zip(*kept, strict=True))
    concepts = None if corpus.concepts is None else corpus.concepts[rows.long(), positions.long()]
    return LatentRecord(
        indices=indices,
        values=values,
        offsets=starts_of(counts.long()),
        n_latents=n_latents,
        ids=ids,
        rows=rows,
        positions=positions,
        texts=corpus.ids[corpus.mask].int(),
        text_offsets=starts_of(corpus.mask.sum(1)),
        concepts=concepts,
    )


def _checked(i: int, part: Part, n_latents: int, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Rows and positions of part `i`, whose latents and tokens are what they should be."""
    acts = part.acts
    if acts.n_latents != n_latents or acts.n != len(part.ids):
        raise ValueError(
            f"block {i}: need {len(part.ids)} tokens of {n_latents} latents from encode, "
            f"got {acts.n} of {acts.n_latents}"
        )
    rows, positions = part.rows.cpu().long(), part.positions.cpu().long()
    n_rows, width = corpus.ids.shape
    inside = not len(rows) or (rows.max() < n_rows and positions.max() < width)
    if not inside or not torch.equal(corpus.ids[rows, positions].long(), part.ids.cpu().long()):
        raise ValueError(f"block {i}: need tokens of the corpus {corpus.name!r}, got others")
    return rows, positions
