"""How well latents, or any features, match concepts that are known for every token.

Rows of the corpus are split in two halves. On one, features and thresholds are chosen; on the
other, F1 is measured; no row is in both. Three classifiers of each concept, all linear with one
threshold: the best single feature (`best`), the best five (`five`) and all (`probe`). Always
saying yes has F1 `2 p / (1 + p)` at a prevalence p, which is 0.67 for a concept on half of the
tokens: `always` in `baselines` gives it for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.analysis.logistic import greedy, linear_probe
from lib.analysis.probes import (
    DenseFeatures,
    Features,
    SparseFeatures,
    best_cuts,
    best_thresholds,
    f1_score,
)
from lib.latents.record import LatentRecord
from lib.sparse import SparseActs
from lib.world import CONCEPTS, concept_matrix

MIN_TOKENS = 20
"""A concept on (or off) fewer tokens of either half is left out."""
FIVE = 5


@dataclass(frozen=True, eq=False)
class ConceptScores:
    """One classifier per concept: yes where `Σ weights · features > threshold`."""

    concepts: tuple[str, ...]
    left_out: tuple[str, ...]
    """Too rare, or too common, to score."""
    f1: Float[Tensor, " c"]
    """On the half that nothing was chosen on."""
    features: Int[Tensor, "c m"]
    weights: Float[Tensor, "c m"]
    thresholds: Float[Tensor, " c"]

    @property
    def mean(self) -> float:
        return float(self.f1.mean())

    def by_concept(self) -> dict[str, float]:
        return dict(zip(self.concepts, self.f1.tolist(), strict=True))


Scores = dict[str, ConceptScores]
"""By classifier: `best`, `five`, `probe`, `always`."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Concepts that can be scored, on both halves."""

    fit: Bool[Tensor, " n"]
    """Tokens of the half that features and thresholds are chosen on."""
    table: Bool[Tensor, "n c"]
    names: tuple[str, ...]
    left_out: tuple[str, ...]

    def scores(
        self,
        held: Float[Tensor, "n_held c"],
        features: Int[Tensor, "c m"],
        weights: Float[Tensor, "c m"],
        thresholds: Float[Tensor, " c"],
    ) -> ConceptScores:
        f1 = f1_score(held > thresholds, self.table[~self.fit])
        return ConceptScores(self.names, self.left_out, f1, features, weights, thresholds)


def score_record(record: LatentRecord, *, seed: int = 0) -> Scores:
    """`best` and `five` of a record's latents, against the concepts it carries.

    Raises:
        ValueError: the record's corpus has no concepts.
    """
    if record.concepts is None:
        raise ValueError("need a record with concepts, got one of a corpus that has none")
    table = torch.from_numpy(concept_matrix(record.concepts.tolist()))
    return score_sparse(record.acts, table, record.rows, CONCEPTS, seed=seed)


def score_sparse(
    acts: SparseActs,
    concepts: Bool[Tensor, "n c"],
    rows: Int[Tensor, " n"],
    names: Sequence[str] = CONCEPTS,
    *,
    seed: int = 0,
) -> Scores:
    """`best` and `five` of latents whose values are at least 0."""
    values = acts.values.float()
    if not (values >= 0).all():
        raise ValueError(f"need latents of at least 0, got {float(values.min())}")
    labels = labels_of(concepts, rows, names, seed)
    return _one_and_five(SparseFeatures(acts.with_values(values)), labels)


def baselines(
    x: Float[Tensor, "n d"],
    concepts: Bool[Tensor, "n c"],
    rows: Int[Tensor, " n"],
    names: Sequence[str] = CONCEPTS,
    *,
    d_sae: int = 1024,
    k: int = 16,
    seed: int = 0,
) -> dict[str, Scores]:
    """What a dictionary on the activations `x` has to beat, and the ceiling.

    Returns:
        `neurons` (the coordinates of `x`), `pca` and `random` (a dictionary of `d_sae` random
        directions of which each token keeps the `k` largest), each with `best` and `five`;
        `linear` with `probe`, a logistic regression on all of `x`; `none` with `always`.
    """
    labels = labels_of(concepts, rows, names, seed)
    x = centred(x, labels.fit)
    held = x[~labels.fit]
    basis = torch.linalg.eigh((x[labels.fit].T @ x[labels.fit]).double()).eigenvectors.flip(1)
    weights = linear_probe(x[labels.fit], labels.table[labels.fit])
    thresholds = best_thresholds(x[labels.fit] @ weights.T, labels.table[labels.fit])
    c, d = weights.shape
    everything = torch.arange(d).expand(c, d)
    nothing = torch.zeros(c, 0)
    return {
        "neurons": _one_and_five(DenseFeatures(x), labels),
        "pca": _one_and_five(DenseFeatures(x @ basis.to(x)), labels),
        "random": _one_and_five(SparseFeatures(random_codes(x, d_sae, k, seed)), labels),
        "linear": {"probe": labels.scores(held @ weights.T, everything, weights, thresholds)},
        "none": {
            "always": labels.scores(
                torch.ones(len(held), c), nothing.long(), nothing, torch.zeros(c)
            )
        },
    }


def random_codes(x: Float[Tensor, "n d"], d_sae: int, k: int, seed: int = 0) -> SparseActs:
    """The `k` largest positive products of each token with `d_sae` random unit directions."""
    if not 1 <= k <= d_sae:
        raise ValueError(f"need k in 1..{d_sae}, got {k}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_sae, x.shape[1], generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    tops = [(part @ directions.T).topk(k, dim=1) for part in x.split(4096)]
    values = torch.cat([top.values for top in tops]).relu().flatten()
    indices = torch.cat([top.indices for top in tops]).flatten()
    return SparseActs(indices, values, torch.arange(len(x) + 1) * k, d_sae).nonzero()


def labels_of(concepts: Tensor, rows: Tensor, names: Sequence[str], seed: int) -> Labels:
    """Split by rows and drop the concepts that cannot be scored."""
    n, c = concepts.shape
    if len(rows) != n or len(names) != c:
        raise ValueError(
            f"need a row for each of {n} tokens and a name for each of {c} concepts, "
            f"got {len(rows)} rows and {len(names)} names"
        )
    shuffled = torch.randperm(int(rows.max()) + 1, generator=torch.Generator().manual_seed(seed))
    fit = (shuffled % 2 == 0)[rows.long()]
    scored = torch.ones(c, dtype=torch.bool)
    for half in (concepts[fit], concepts[~fit]):
        on = half.sum(0)
        scored &= (on >= MIN_TOKENS) & (len(half) - on >= MIN_TOKENS)
    if not scored.any():
        raise ValueError(
            f"need a concept on and off at least {MIN_TOKENS} tokens of each half of the rows, "
            f"got none in {n} tokens"
        )
    kept = tuple(name for name, good in zip(names, scored.tolist(), strict=True) if good)
    left_out = tuple(name for name in names if name not in kept)
    return Labels(fit, concepts[:, scored], kept, left_out)


def centred(x: Tensor, fit: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError("need finite features, got NaN or inf")
    x = x.float().cpu()
    return x - x[fit].mean(0)


def _one_and_five(features: Features, labels: Labels) -> Scores:
    fit, held = features.take(labels.fit), features.take(~labels.fit)
    table = labels.table[labels.fit]
    feature, sign, threshold = best_cuts(fit, table)
    best = labels.scores(held.columns(feature) * sign, feature[:, None], sign[:, None], threshold)
    chosen, weights = greedy(fit, table, FIVE)
    cuts = best_thresholds(_weighted(fit, chosen, weights), table)
    five = labels.scores(_weighted(held, chosen, weights), chosen, weights, cuts)
    return {"best": best, "five": five}


def _weighted(features: Features, chosen: Tensor, weights: Tensor) -> Float[Tensor, "n c"]:
    pairs = zip(chosen.T, weights.T, strict=True)
    return sum(features.columns(feature) * weight for feature, weight in pairs)
