"""Linear classifiers of many concepts at once, on one, a few or all features.

Labels are `[n c]`, one column a concept; everything is vectorised over concepts. Features are
`SparseFeatures` or `DenseFeatures`, which give the same few products.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from lib.sparse import SparseActs

CHUNK = 2**21
"""Entries ranked at once: bounds memory at about 50 · CHUNK bytes."""


class Entries(NamedTuple):
    """Values of some features, largest first within each feature."""

    values: Float[Tensor, " entries"]
    tokens: Int[Tensor, " entries"]
    features: Int[Tensor, " some"]
    signs: Float[Tensor, " some"]
    """-1 where the values are the feature's negated ones."""
    starts: Int[Tensor, " some_plus_1"]
    rest: float
    """Value of the tokens that have no entry."""


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """Latents; their values are at least 0, and most are 0."""

    acts: SparseActs

    @property
    def n(self) -> int:
        return self.acts.n

    def take(self, tokens: Bool[Tensor, " n"]) -> "SparseFeatures":
        """These tokens only."""
        return SparseFeatures(self.acts.tokens(tokens))

    def columns(self, features: Int[Tensor, " c"]) -> Float[Tensor, "n c"]:
        order, starts = self.acts.by_latent
        out = torch.zeros(self.n, len(features))
        for column, feature in enumerate(features.tolist()):
            pairs = order[starts[feature] : starts[feature + 1]]
            out[self.acts.rows[pairs], column] = self.acts.values[pairs]
        return out

    def against(self, r: Float[Tensor, "n c"], power: int = 1) -> Float[Tensor, "m c"]:
        """Sum over tokens of `features ** power · r`."""
        order, starts = self.acts.by_latent
        return embedding_bag(
            self.acts.rows_by_latent,
            r.contiguous(),
            starts,
            mode="sum",
            per_sample_weights=self.acts.values[order] ** power,
            include_last_offset=True,
        )

    def entries(self) -> Iterator[Entries]:
        """All values that are not 0, a chunk of features at a time."""
        acts = self.acts
        order = acts.values.argsort(descending=True, stable=True)
        order = order[acts.indices[order].argsort(stable=True)]
        starts = acts.by_latent[1]
        first = 0
        while first < acts.n_latents:
            last = int(torch.searchsorted(starts, starts[first] + CHUNK, right=True)) - 1
            last = min(max(last, first + 1), acts.n_latents)
            pairs = order[starts[first] : starts[last]]
            yield Entries(
                acts.values[pairs],
                acts.rows[pairs],
                torch.arange(first, last),
                torch.ones(last - first),
                starts[first : last + 1] - starts[first],
                0.0,
            )
            first = last


@dataclass(frozen=True, eq=False)
class DenseFeatures:
    """Coordinates of any kind; both their signs count."""

    x: Float[Tensor, "n m"]

    @property
    def n(self) -> int:
        return len(self.x)

    def take(self, tokens: Bool[Tensor, " n"]) -> "DenseFeatures":
        return DenseFeatures(self.x[tokens])

    def columns(self, features: Int[Tensor, " c"]) -> Float[Tensor, "n c"]:
        return self.x[:, features]

    def against(self, r: Float[Tensor, "n c"], power: int = 1) -> Float[Tensor, "m c"]:
        return (self.x**power).T @ r

    def entries(self) -> Iterator[Entries]:
        width = max(CHUNK // max(self.n, 1), 1)
        for features in torch.arange(self.x.shape[1]).split(width):
            values, tokens = self.x[:, features].T.sort(dim=1, descending=True)
            starts = torch.arange(len(features) + 1) * self.n
            for sign in (1.0, -1.0):
                signs = torch.full((len(features),), sign)
                flat = values.flatten(), tokens.flatten()
                yield Entries(*flat, features, signs, starts, -torch.inf)
                values, tokens = -values.flip(1), tokens.flip(1)


Features = SparseFeatures | DenseFeatures


def best_cuts(
    features: Features, labels: Bool[Tensor, "n c"]
) -> tuple[Int[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """For each concept the feature, sign and threshold with the highest F1 on these tokens.

    Tokens with `sign · feature > threshold` are taken for the concept. Tokens of equal value are
    on the same side; a threshold lies half way between two values. Where no feature is active on
    any of a concept's tokens, no token is taken.
    """
    best = torch.zeros(labels.shape[1])
    feature, sign = torch.zeros_like(best).long(), torch.ones_like(best)
    threshold = torch.full_like(best, torch.inf)
    for some in features.entries():
        owner = torch.arange(len(some.features)).repeat_interleave(some.starts.diff())
        end = _tie_ends(some, owner)
        rank = end - some.starts[owner] + 1
        for c, y in enumerate(labels.T.contiguous()):
            f1, i = _best_entry(y, some.tokens, owner, rank)
            if f1 > best[c]:
                best[c], feature[c], sign[c] = f1, some.features[owner[i]], some.signs[owner[i]]
                is_last = int(end[i]) + 1 == int(some.starts[owner[i] + 1])
                after = some.rest if is_last else some.values[end[i] + 1]
                threshold[c] = (some.values[i] + after) / 2
    return feature, sign, threshold


def _tie_ends(some: Entries, owner: Int[Tensor, " entries"]) -> Int[Tensor, " entries"]:
    """For each entry the last one of its feature that has the same value."""
    is_end = torch.ones(len(owner), dtype=torch.bool)
    is_end[:-1] = (some.values[1:] != some.values[:-1]) | (owner[1:] != owner[:-1])
    return is_end.nonzero()[:, 0][is_end.cumsum(0) - is_end.long()]


def _best_entry(
    y: Bool[Tensor, " n"],
    tokens: Int[Tensor, " entries"],
    owner: Int[Tensor, " entries"],
    rank: Int[Tensor, " entries"],
) -> tuple[float, int]:
    """The highest F1 of "this entry and all of its feature that are at least as large".

    A best cut falls right after a true token, so only these are looked at. Within a tie an early
    one counts too few true tokens, which the last one makes good.
    """
    true = y.take(tokens).nonzero()[:, 0]
    if not len(true):
        return 0.0, 0
    whose = owner[true]
    counts = torch.bincount(whose)
    before = counts.cumsum(0) - counts
    found = torch.arange(1, len(true) + 1) - before[whose]
    f1 = 2 * found / (rank[true] + y.sum())
    best = int(f1.argmax())
    return float(f1[best]), int(true[best])


def best_thresholds(
    scores: Float[Tensor, "n c"], labels: Bool[Tensor, "n c"]
) -> Float[Tensor, " c"]:
    """For each concept the threshold on its own score with the highest F1 on these tokens."""
    ordered, tokens = scores.sort(0, descending=True)
    found = labels.gather(0, tokens).float().cumsum_(0)
    predicted = torch.arange(1, len(scores) + 1)[:, None]
    f1 = 2 * found / (predicted + found[-1])
    f1[:-1][ordered[1:] == ordered[:-1]] = -1
    cut = f1.argmax(0, keepdim=True)
    after = torch.cat([ordered[1:], ordered.new_full((1, scores.shape[1]), -torch.inf)])
    return ((ordered + after) / 2).gather(0, cut)[0]


def f1_score(predicted: Bool[Tensor, "n c"], labels: Bool[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """2 TP / (predicted + positives); 0 where both are none."""
    both = (predicted & labels).sum(0)
    return 2 * both / (predicted.sum(0) + labels.sum(0)).clamp(min=1)
