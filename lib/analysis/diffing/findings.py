"""What a method found between two models, in the same form for every method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.analysis.diffing.answers import amplified, answer_difference, mined_topics
from lib.analysis.diffing.outputs import OutputDifference
from lib.analysis.diffing.scores import Move, concept_ranking
from lib.analysis.diffing.sites import SiteReading
from lib.analysis.diffing.streams import StreamDifference, lens
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary
from lib.latents import LatentRecord
from lib.models.generate import answer

N = 10
"""Findings of a method that are looked at."""
MIN_FIRINGS = 20
"""Tokens on which a latent must fire to be ranked."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Finding:
    """What one method says about a pair of models, a and b."""

    method: str
    access: str
    """What it must read: `answers`, `logits`, `activations`, or `training` where it trains."""
    words: list[int] = field(default_factory=list)
    """Token ids that it names, most first."""
    concepts: list[str] = field(default_factory=list)
    """Concepts of the world that it names, most first."""
    scores: Float[Tensor, " n"] | None = None
    """Of every real token: how much the models differ there."""
    strength: list[float] = field(default_factory=list)
    """Of its first `N` findings, most first, in a unit that holds from pair to pair."""
    latents: Int[Tensor, " m"] | None = None
    """Those that it says b has and a has not, most first."""
    decides: bool = False
    """Whether the method says itself how many differ; else it always gives the first `N`."""
    order: Float[Tensor, " n_latents"] | None = None
    """Of every latent how much it differs; higher is more."""
    move: Callable[[Int[Tensor, " k"]], Move] | None = None
    """From latents to the move that hands them from b to a."""
    size: Float[Tensor, " n_latents"] | None = None
    """Norm of what one unit of a latent moves."""
    directions: Float[Tensor, "k d"] | None = None
    """Of norm 1 and at right angles to each other."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found, and what it took."""

    finding: Finding
    seconds: float
    record: LatentRecord | None = None
    dictionary: Dictionary | None = None
    reading: SiteReading | None = None


def require_known(methods: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for a method that there is not."""
    if unknown := sorted(set(methods) - set(known)):
        raise ValueError(f"need methods of {', '.join(known)}; got {', '.join(unknown)}")


def of_outputs(difference: OutputDifference, held: Corpus) -> Finding:
    """KL per token of the corpus."""
    by_word = difference.by_word / len(difference.kl)
    first = by_word.topk(N)
    return Finding(
        method="KL per token",
        access="logits",
        words=first.indices.tolist(),
        concepts=_named(difference.kl, held),
        scores=difference.kl,
        strength=first.values.tolist(),
    )


def of_topics(difference: OutputDifference, held: Corpus, k: int = 5) -> Finding:
    """Logit-difference mining: the first two words of every topic, then the next two, …"""
    if not difference.excess.any():
        return Finding(method="logit-difference topics", access="logits")
    loadings, words = mined_topics(difference.excess, k)
    scores = torch.zeros(len(difference.kl))
    scores[difference.top] = loadings.sum(1)
    named = [word for pair in words.split(2, dim=1) for word in pair.flatten().tolist()]
    strength = sorted((loadings.sum(0) / len(difference.kl)).tolist(), reverse=True)
    return Finding(
        method="logit-difference topics",
        access="logits",
        words=list(dict.fromkeys(named))[:N],
        concepts=_named(scores, held),
        scores=scores,
        strength=strength,
    )


def of_streams(
    difference: StreamDifference, held: Corpus, unembedding: Float[Tensor, "vocab d"], k: int = 10
) -> Finding:
    """PCA of the activation difference; the tokens that its components raise most."""
    size = float(difference.size.square().mean())
    scores = torch.zeros(held.n_tokens)
    scores[_number(difference.rows, difference.positions, held)] = difference.size
    directions = difference.components[:k]
    raised = [lens(sign * d, unembedding, 2) for d in directions for sign in (1, -1)]
    return Finding(
        method="PCA of the difference",
        access="activations",
        words=list(dict.fromkeys(torch.stack(raised).T.flatten().tolist()))[:N],
        concepts=_named(scores, held),
        scores=scores,
        strength=[size * share for share in difference.energy[:N].tolist()],
        directions=directions,
    )


def of_positions(
    difference: StreamDifference, held: Corpus, unembedding: Float[Tensor, "vocab d"]
) -> Finding:
    """Activation difference lens: the mean difference at the first positions, and at all."""
    means = torch.cat([difference.mean[None], difference.by_position])
    means = means[means.isfinite().all(1)]
    means = means[means.norm(dim=1) > 0]
    raised = torch.stack([lens(mean, unembedding, N) for mean in means])
    directions = torch.linalg.qr(means.T).Q.T
    return Finding(
        method="activation difference lens",
        access="activations",
        words=list(dict.fromkeys(raised.T.flatten().tolist()))[:N],
        strength=sorted(means.norm(dim=1).tolist(), reverse=True),
        directions=directions,
    )


def of_answers(
    tokenizer: PreTrainedTokenizerBase,
    a: PreTrainedModel,
    b: PreTrainedModel,
    prompts: Sequence[str],
    held: Corpus,
    *,
    alpha: float = 0.0,
    max_new_tokens: int = 32,
) -> Finding:
    """The two models' greedy answers, side by side.

    Args:
        alpha: above 0, b's answers are amplified.
    """
    options = {"max_new_tokens": max_new_tokens}
    before = answer(a, tokenizer, list(prompts), **options)
    if alpha:
        after = amplified(a, b, tokenizer, prompts, alpha=alpha, **options)
    else:
        after = answer(b, tokenizer, list(prompts), **options)
    found = answer_difference(tokenizer, before, after)
    vocabulary = max([int(held.ids.max()), *(token for token, _ in found)]) + 1
    rise = torch.zeros(vocabulary)
    for token, z in found:
        rise[token] = max(z, 0.0)
    return Finding(
        method="contrastive decoding" if alpha else "reading answers",
        access="logits" if alpha else "answers",
        words=[token for token, z in found[:N] if z > 0],
        concepts=_named(rise[held.ids[held.mask].long()], held),
        strength=[z for _, z in found[:N]],
    )


def of_latents(
    method: str,
    record: LatentRecord,
    held: Corpus,
    order: Float[Tensor, " n_latents"],
    latents: Int[Tensor, " m"],
    move: Callable[[Int[Tensor, " k"]], Move] | None,
    *,
    size: Float[Tensor, " n_latents"] | None = None,
    decides: bool = False,
) -> Finding:
    """Latents that a method ranks, named by the tokens and concepts on which they fire.

    Args:
        record: of tokens of `held`; those that are missing differ by 0.
        order: of every latent how much it differs.
        latents: those that are said to differ, most first; the first `N` name what differs.
        size, decides: of `Finding`.
    """
    chosen = torch.zeros(record.n_latents)
    chosen[latents[:N]] = 1.0
    acts = record.acts
    mass = acts.values * chosen[acts.indices.long()]
    scores = torch.zeros(held.n_tokens)
    scores[places(record, held)] = torch.zeros(acts.n).index_add_(0, acts.rows.long(), mass)
    words = []
    for latent in latents[:N].tolist():
        tokens, values = record.active(latent)
        by_word = torch.zeros(int(record.ids.max()) + 1)
        by_word.index_add_(0, record.ids[tokens.long()].long(), values)
        words.append(int(by_word.argmax()))
    return Finding(
        method=method,
        access="training",
        words=list(dict.fromkeys(words)),
        concepts=_named(scores, held) if len(latents) else [],
        scores=scores if len(latents) else None,
        strength=order[latents[:N]].sort(descending=True).values.tolist(),
        decides=decides,
        latents=latents,
        order=order,
        move=move,
        size=size,
    )


def firings(record: LatentRecord) -> Int[Tensor, " n_latents"]:
    """Tokens on which each latent fires."""
    return torch.bincount(record.indices.long(), minlength=record.n_latents)


def places(record: LatentRecord, corpus: Corpus) -> Int[Tensor, " n"]:
    """Of each recorded token its number among the corpus's real tokens."""
    return _number(record.rows, record.positions, corpus)


def _number(rows: Tensor, positions: Tensor, corpus: Corpus) -> Int[Tensor, " n"]:
    numbers = corpus.mask.flatten().cumsum(0).view_as(corpus.mask) - 1
    return numbers[rows.long(), positions.long()]


def crosscoder_move(d: Dictionary) -> Callable[[Int[Tensor, " k"]], Move]:
    """Moves a by what the latents write at b more than at a."""
    site, rows = d.config.site_dims[0], d.decoder_rows.detach()

    def hand_over(latents: Int[Tensor, " k"]) -> Move:
        apart = rows[latents, site:] - rows[latents, :site]
        return lambda x_a, x_b: x_a + _at(d, torch.cat([x_a, x_b], 1), latents) @ apart

    return hand_over


def difference_move(d: Dictionary) -> Callable[[Int[Tensor, " k"]], Move]:
    """Moves a by what the latents of a difference-SAE write."""
    rows = d.decoder_rows.detach()
    return lambda latents: lambda x_a, x_b: x_a + _at(d, x_b - x_a, latents) @ rows[latents]


def sae_move(d: Dictionary) -> Callable[[Int[Tensor, " k"]], Move]:
    """Moves a to where the latents of an SAE have b's values."""
    rows = d.decoder_rows.detach()
    return lambda latents: (
        lambda x_a, x_b: x_a + (_at(d, x_b, latents) - _at(d, x_a, latents)) @ rows[latents]
    )


def along(directions: Float[Tensor, "k d"]) -> Move:
    """Moves a by the part of the difference that lies in the directions."""

    def part(x_a: Tensor, x_b: Tensor) -> Tensor:
        d = directions.to(x_b.device)
        return x_a + (x_b - x_a).float() @ d.T @ d

    return part


def _at(d: Dictionary, x: Tensor, latents: Int[Tensor, " k"]) -> Float[Tensor, "n k"]:
    return d.encode(x)[:, latents]


def _named(scores: Float[Tensor, " n"], held: Corpus) -> list[str]:
    if held.concepts is None:
        return []
    return [name for name, _ in concept_ranking(scores, held.concepts[held.mask])[:N]]
