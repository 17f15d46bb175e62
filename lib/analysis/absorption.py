"""Feature absorption: does a latent for one word swallow the direction of the word's class?

A dictionary with a latent for *animal* and one for *dog* is sparser if the second also writes the
animal direction and the first stays silent on dogs: it looks clean, but has holes. In the world
the hierarchy is known: a parent is a lexical concept (`animal`), its children are the words that
always carry it (`dog`, `hens`).

Source: Chanin et al. 2024, arXiv:2409.14507. Of the tokens of a parent that a linear probe finds,
the share where no main latent of the parent fires and the latent that adds most to the probe's
score adds at least 0.4 of it. What differs from the paper:

- `rate` also wants the absorbing latent to belong to the child: most of its firing is on that one
  token id. `loose_rate` does not, and is nearer to the paper's.
- The 0.4 is of what all active latents add to the score, positive parts only. The paper divides
  by the projection of the activation, which depends on where the origin is.
- There is no least cosine with the probe (0.025 in the paper): in a small model it is noise.
- A main latent needs a positive weight in the sparse probe of the parent.
- Probe, main latents and owners come from half of the rows, the counts from the other half.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.analysis.logistic import greedy, linear_probe
from lib.analysis.probes import SparseFeatures, best_thresholds, f1_score
from lib.analysis.truth import MIN_TOKENS, centred, labels_of
from lib.latents.record import LatentRecord
from lib.sparse import SparseActs
from lib.world import CONCEPTS, concept_matrix
from lib.world.lexicon import LEXICAL

MIN_GAIN = 0.03
"""What a further main latent must add to F1; Chanin et al."""
OWN = 0.5
"""A latent belongs to a token id that has more than this share of its firing."""


@dataclass(frozen=True, eq=False)
class Absorption:
    """Counts of held-out tokens for each parent; each is part of the one above."""

    parents: tuple[str, ...]
    left_out: tuple[str, ...]
    """Too rare or common, with fewer than two children, or without a latent that means them."""
    main: tuple[tuple[int, ...], ...]
    """Main latents of each parent, the best first."""
    n_children: Int[Tensor, " p"]
    n_tokens: Int[Tensor, " p"]
    """Of a child, and the probe finds the parent."""
    silent: Int[Tensor, " p"]
    """No main latent fires."""
    dominated: Int[Tensor, " p"]
    """One latent adds at least the share to the probe's score."""
    absorbed: Int[Tensor, " p"]
    """That latent belongs to the child."""

    @property
    def rate(self) -> Float[Tensor, " p"]:
        return self.absorbed / self.n_tokens

    @property
    def loose_rate(self) -> Float[Tensor, " p"]:
        return self.dominated / self.n_tokens

    @property
    def mean(self) -> float:
        """Of `rate`, every parent counting the same."""
        return float(self.rate.mean())


def absorption(
    record: LatentRecord,
    x: Float[Tensor, "n d"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    k: int = 5,
    share: float = 0.4,
    seed: int = 0,
) -> Absorption:
    """How often words absorb their class, by class.

    The latent of a child with many of its parent's tokens raises F1 by `MIN_GAIN`, so it becomes
    a main one: that is a split parent, and not absorption.

    Args:
        record: of a corpus with concepts.
        x: activations of the record's tokens, in its order, at the site the dictionary reads.
        k: main latents of a parent, at most.
        share: what the absorbing latent adds, of what all do.
        seed: of the split of rows.

    Raises:
        ValueError: no concepts, sizes that differ, a negative latent, no parent to score, or `k`
            or `share` out of range.
    """
    _check(record, x, W_dec, k, share)
    columns = [CONCEPTS.index(name) for name in LEXICAL]
    table = torch.from_numpy(concept_matrix(record.concepts.tolist())[:, columns])
    labels = labels_of(table, record.rows, LEXICAL, seed)
    fit, table, ids = labels.fit, labels.table, record.ids.long()
    x = centred(x, fit)
    weights = linear_probe(x[fit], table[fit])
    found = (x @ weights.T > best_thresholds(x[fit] @ weights.T, table[fit]))[~fit]
    seen, held = (SparseFeatures(record.acts.nonzero()).take(half) for half in (fit, ~fit))
    main = _main_latents(seen, table[fit], k)
    owned = _owners(seen.acts, ids[fit])[held.acts.indices.long()] == ids[~fit][held.acts.rows]
    adds = W_dec.detach().float().cpu() @ weights.T
    children = [_children(ids, on) for on in table.T]
    counts = torch.tensor([
        _count(held.acts, found[:, c] & child[ids[~fit]], main[c], adds[:, c], owned, share)
        for c, child in enumerate(children)
    ])  # fmt: skip
    n_children = torch.stack([child.sum() for child in children])
    kept = torch.tensor([bool(m) for m in main]) & (n_children >= 2) & (counts[:, 0] >= MIN_TOKENS)
    if not kept.any():
        parts = f"two children, a main latent and {MIN_TOKENS} tokens that the probe finds"
        raise ValueError(f"need a parent with {parts}, got none")
    places = kept.nonzero()[:, 0].tolist()
    parents = tuple(labels.names[c] for c in places)
    left_out = tuple(name for name in LEXICAL if name not in parents)
    main = tuple(main[c] for c in places)
    return Absorption(parents, left_out, main, n_children[kept], *counts[kept].T)


def _check(record: LatentRecord, x: Tensor, W_dec: Tensor, k: int, share: float) -> None:
    if record.concepts is None:
        raise ValueError("need a record with concepts, got one of a corpus that has none")
    if not (record.values >= 0).all():
        raise ValueError(f"need latents of at least 0, got {float(record.values.min())}")
    if len(x) != len(record):
        raise ValueError(f"need x of the record's {len(record)} tokens, got {len(x)}")
    if W_dec.shape != (shape := (record.n_latents, x.shape[1])):
        raise ValueError(f"need W_dec of shape {shape}, got {tuple(W_dec.shape)}")
    if not 1 <= k <= record.n_latents:
        raise ValueError(f"need k in 1..{record.n_latents}, got {k}")
    if not 0 < share <= 1:
        raise ValueError(f"need share in (0, 1], got {share}")


def _children(ids: Int[Tensor, " n"], on: Bool[Tensor, " n"]) -> Bool[Tensor, " vocabulary"]:
    """Token ids that occur, and never without the concept."""
    size = int(ids.max()) + 1
    with_it, without = (torch.bincount(ids[half], minlength=size) for half in (on, ~on))
    return (with_it > 0) & (without == 0)


def _main_latents(
    features: SparseFeatures, table: Bool[Tensor, "n c"], k: int
) -> list[tuple[int, ...]]:
    """Latents of each concept's sparse probe, until the next does not raise F1 by `MIN_GAIN`."""
    f1, growing = torch.zeros(table.shape[1]), torch.ones(table.shape[1], dtype=torch.bool)
    main: list[tuple[int, ...]] = [()] * table.shape[1]
    for m in range(1, k + 1):
        latents, weights = greedy(features, table, m)
        pairs = zip(latents.T, weights.T, strict=True)
        scores = sum(features.columns(latent) * weight for latent, weight in pairs)
        new = f1_score(scores > best_thresholds(scores, table), table)
        growing &= new >= f1 + MIN_GAIN
        for c in growing.nonzero()[:, 0].tolist():
            main[c] = tuple(latents[c, weights[c] > 0].tolist())
        f1 = new
    return main


def _owners(acts: SparseActs, ids: Int[Tensor, " n"]) -> Int[Tensor, " n_latents"]:
    """The token id that each latent belongs to; -1 where there is none."""
    size = int(ids.max()) + 1
    keys, counts = (acts.indices.long() * size + ids[acts.rows]).unique(return_counts=True)
    fires = torch.bincount(acts.indices, minlength=acts.n_latents)
    keys = keys[counts > OWN * fires[keys // size]]
    return torch.full((acts.n_latents,), -1).index_put_((keys // size,), keys % size)


def _count(
    acts: SparseActs,
    asked: Bool[Tensor, " n"],
    main: tuple[int, ...],
    adds: Float[Tensor, " n_latents"],
    owned: Bool[Tensor, " nnz"],
    share: float,
) -> list[int]:
    """Tokens asked for; of them silent, dominated, absorbed. A unit of latent j adds `adds[j]`."""
    rows, silent = acts.rows, asked.clone()
    silent[rows[torch.isin(acts.indices, torch.tensor(main))]] = False
    parts = (acts.values.float() * adds[acts.indices.long()]).clamp(min=0)
    total, top = torch.zeros(2, len(asked))
    total.index_add_(0, rows, parts)
    top.scatter_reduce_(0, rows, parts, "amax")
    leads = silent[rows] & (parts > 0) & (parts == top[rows]) & (parts >= share * total[rows])
    absorbing = (len(rows[pairs].unique()) for pairs in (leads, leads & owned))
    return [int(asked.sum()), int(silent.sum()), *absorbing]
