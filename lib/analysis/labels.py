"""Names for latents: the concept that a latent's firing detects, and the tokens it fires on."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import PreTrainedTokenizerBase

from lib.latents.record import LatentRecord
from lib.sparse.acts import starts_of
from lib.world import CONCEPTS, concept_matrix

N_TOKENS = 3
"""Tokens that a label names at most."""
FAINT = 0.1
"""A token with less than this share of the first token's mass is not named."""


@dataclass(frozen=True)
class Label:
    """What a latent seems to stand for."""

    latent: int
    concept: str
    """Of `lib.world.CONCEPTS`; empty where none is detected, or the record knows none."""
    f1: float
    """Of firing as a detector of the best concept; 0 where the record knows none."""
    tokens: tuple[int, ...]
    """Ids of the tokens with most of the activation mass, most first."""

    def name(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The concept alone, or the tokens where there is none."""
        return self.concept or self._tokens(tokenizer)

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """`operator · plus, times`, or `plus, times` where there is no concept."""
        return " · ".join(part for part in (self.concept, self._tokens(tokenizer)) if part)

    def _tokens(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return ", ".join(token_text(tokenizer, token) for token in self.tokens)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as a reader sees it: without spaces round it, and those alone as `␣`, `↵`, `⇥`."""
    text = tokenizer.decode([token])
    return text.strip() or text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def concept_labels(record: LatentRecord, *, min_f1: float = 0.3) -> dict[int, Label]:
    """A label for every latent that fires.

    F1 favours frequent concepts: a latent that fires at random on half of the tokens has F1 0.5
    for a concept on half of them. So the best concept is the one with the highest F1 after
    correction for chance, `(F1 - c) / (1 - c)` with c the F1 of firing as often at random; this
    is Cohen's kappa.

    Args:
        min_f1: corrected F1 under which a latent detects no concept.
    """
    latents = record.firing_rate().nonzero()[:, 0]
    best, f1, corrected = _best_concepts(record, latents)
    tokens = _top_tokens(record, latents)
    return {
        latent: Label(latent, CONCEPTS[c] if enough else "", score, own)
        for latent, c, score, enough, own in zip(
            latents.tolist(),
            best.tolist(),
            f1.tolist(),
            (corrected >= max(min_f1, 1e-9)).tolist(),
            tokens,
            strict=True,
        )
    }


def concept_tokens(record: LatentRecord, concept: str) -> Bool[Tensor, " n"]:
    """The tokens that carry `concept`.

    Raises:
        ValueError: no such concept, or a record of a corpus that has none.
    """
    if concept not in CONCEPTS:
        raise ValueError(f"need a concept of lib.world.CONCEPTS, got {concept!r}")
    if record.concepts is None:
        raise ValueError("need a record with concepts, got one of a corpus that has none")
    return (record.concepts >> CONCEPTS.index(concept) & 1).bool()


def concept_mass(record: LatentRecord, concept: str) -> Float[Tensor, " n_latents"]:
    """Share of each latent's activation mass Σ|value| on tokens with `concept`; 0 for a dead one.

    To be held against `chance`.

    Raises:
        ValueError: no such concept, or a record of a corpus that has none.
    """
    return _mass(record, concept_tokens(record, concept))


def chance(record: LatentRecord, concept: str) -> float:
    """Share of the tokens that carry `concept`: the mass of a latent that does not care.

    Raises:
        ValueError: no such concept, or a record of a corpus that has none.
    """
    return float(concept_tokens(record, concept).double().mean())


def _mass(record: LatentRecord, tokens: Bool[Tensor, " n"]) -> Float[Tensor, " n_latents"]:
    mass, n = record.values.abs().double(), record.n_latents
    there = mass * tokens[record.acts.rows]
    total = torch.bincount(record.indices, mass, minlength=n)
    return (torch.bincount(record.indices, there, minlength=n) / total.clamp(min=1e-300)).float()


def _best_concepts(
    record: LatentRecord, latents: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """For each of these latents the concept it detects best, its F1 and the corrected F1."""
    if record.concepts is None:
        none = torch.zeros(len(latents))
        return none.long(), none, none
    table = torch.from_numpy(concept_matrix(record.concepts.tolist())).float()
    columns = record.by_latent
    both = embedding_bag(
        columns.tokens, table, columns.offsets, mode="sum", include_last_offset=True
    )[latents]
    fired, carry = columns.offsets.diff()[latents, None].float(), table.sum(0)
    f1 = 2 * both / (fired + carry)
    at_random = 2 * fired * carry / (fired + carry) / len(record)
    corrected, best = ((f1 - at_random) / (1 - at_random).clamp(min=1e-9)).max(1)
    return best, f1.gather(1, best[:, None])[:, 0], corrected


def _top_tokens(record: LatentRecord, latents: Int[Tensor, " m"]) -> list[tuple[int, ...]]:
    """For each of these latents the ids of its `N_TOKENS` tokens with most mass."""
    n_ids = int(record.ids.max()) + 1 if len(record) else 1
    pairs = record.indices.long() * n_ids + record.ids.long()[record.acts.rows]
    kinds, which = pairs.unique(return_inverse=True)
    mass = torch.bincount(which, record.values.abs().double())
    owner = kinds // n_ids
    heaviest = mass.new_zeros(record.n_latents).scatter_reduce_(0, owner, mass, "amax")
    some = (mass >= FAINT * heaviest[owner]).nonzero()[:, 0]
    some = some[mass[some].argsort(descending=True, stable=True)]
    some = some[owner[some].argsort(stable=True)]
    first = starts_of(torch.bincount(owner[some], minlength=record.n_latents))
    some = some[torch.arange(len(some)) - first[owner[some]] < N_TOKENS]
    counts = torch.bincount(owner[some], minlength=record.n_latents)[latents]
    ids = kinds[some] % n_ids
    return [tuple(part.tolist()) for part in ids.split(counts.tolist())]
