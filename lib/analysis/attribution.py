"""What a SAE-LoRA says: what it reads and writes, in words and in logits.

A pathway is one rank: it reads a weighted sum of latents, `z @ Â_r`, and writes that times `s_r`
along `B̂_r`. The product does not change when two of Â_r, B̂_r and s_r change sign, so signs are
fixed here: the sum of the weights a pathway reads is not negative, and its scale is not either.
What is left of the sign is in the weights it writes: a pathway that fires adds latents of positive
weight and takes away those of negative weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lib.adapters.sae_lora.adapter import SaeLora
from lib.analysis.labels import token_text
from lib.latents.record import LatentRecord
from lib.models.unembed import unembedding


@dataclass(frozen=True, eq=False)
class Pathway:
    """One rank of an adapter, with its signs fixed."""

    read: Float[Tensor, " d_sae"]
    write: Float[Tensor, " d_sae"]
    scale: float
    """Not negative."""


@dataclass(frozen=True)
class Concentration:
    """How few latents hold an adapter's weight, on one side."""

    participation: float
    """(Σ w²)² / Σ w⁴: the number of equal weights that would be as concentrated."""
    n_nonzero: int
    n_over_1_percent: int
    """Latents with more than 1 % of the largest weight."""
    top_10: float
    """Share of Σ w² that the ten strongest latents hold."""


def concentration(weights: Float[Tensor, "d_sae r"]) -> Concentration:
    """Concentration of the latents' norms over ranks.

    Raises:
        ValueError: weights that are all zero, or not finite.
    """
    squares = weights.detach().double().square().sum(1)
    total = float(squares.sum())
    if not 0 < total < float("inf"):
        raise ValueError(f"need finite weights that are not all zero, got a sum of squares {total}")
    strongest = squares.sort(descending=True).values
    return Concentration(
        participation=float(squares.sum() ** 2 / squares.square().sum()),
        n_nonzero=int((squares > 0).sum()),
        n_over_1_percent=int((squares > 1e-4 * strongest[0]).sum()),
        top_10=float(strongest[:10].sum() / total),
    )


@torch.no_grad()
def pathways(adapter: SaeLora) -> list[Pathway]:
    """The ranks, in the adapter's order."""
    found = []
    for a, b, s in zip(
        adapter.read_weights.T, adapter.write_weights, adapter.scale.tolist(), strict=True
    ):
        flip = -1.0 if a.sum() < 0 else 1.0
        found.append(Pathway(flip * a, (flip if s >= 0 else -flip) * b, abs(s)))
    return found


def read(adapter: SaeLora) -> Float[Tensor, " d_sae"]:
    """How strongly each latent is read: Σ_r |s_r Â_jr|, with the sign of the largest term.

    At rank 1 these are the read weights times the scale.
    """
    return _strength(torch.stack([path.scale * path.read for path in pathways(adapter)]))


def written(adapter: SaeLora) -> Float[Tensor, " d_sae"]:
    """How strongly each latent is written: Σ_r |s_r B̂_rj|, with the sign of the largest term.

    At rank 1 these are the write weights times the scale.
    """
    return _strength(torch.stack([path.scale * path.write for path in pathways(adapter)]))


def _strength(terms: Float[Tensor, "r d_sae"]) -> Float[Tensor, " d_sae"]:
    largest = terms.abs().argmax(0, keepdim=True)
    return terms.abs().sum(0) * terms.gather(0, largest)[0].sign()


@torch.no_grad()
def read_mass(adapter: SaeLora, share: Float[Tensor, " d_sae"], record: LatentRecord) -> float:
    """Where what the adapter reads lies: the mean of `share` over its reads.

    Each latent counts by its read weight (norm over ranks) times its activation mass in `record`.

    Args:
        share: of each latent's mass, from `lib.analysis.labels.concept_mass`.
    """
    mass = torch.zeros(record.n_latents, dtype=torch.float64)
    mass.index_add_(0, record.indices.long(), record.values.abs().double())
    mass *= adapter.read_weights.norm(dim=1).double().cpu()
    return float((mass * share.double()).sum() / mass.sum())


@torch.no_grad()
def logit_attribution(
    adapter: SaeLora, model: nn.Module, latents: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n vocab"]:
    """What writing each latent does to the logits by the direct path, past all later blocks.

    The decoder row through the final norm's scale and the unembedding, with the sign with which
    the adapter writes the latent. The norm's division is left out: it scales all tokens alike.

    Args:
        latents: those that are written, the strongest first, where it is None.

    Raises:
        ValueError: latents that the adapter does not write, or what `unembedding` refuses.
    """
    latents = adapter.write_support if latents is None else latents
    signs = written(adapter)[latents].sign()
    if (signs == 0).any():
        raise ValueError(f"need latents that are written, got {latents[signs == 0].tolist()}")
    logits = unembedding(model)
    rows = adapter.dictionary.W_dec[latents] * signs[:, None]
    return rows.to(logits) @ logits.T


def promoted(
    logits: Float[Tensor, " vocab"], tokenizer: PreTrainedTokenizerBase, n: int
) -> list[tuple[str, float]]:
    """The `n` tokens with the highest logits, highest first; ids without a token do not count."""
    values, ids = logits[: len(tokenizer)].topk(min(n, len(tokenizer), len(logits)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [(token_text(tokenizer, token), value) for token, value in pairs]


def suppressed(
    logits: Float[Tensor, " vocab"], tokenizer: PreTrainedTokenizerBase, n: int
) -> list[tuple[str, float]]:
    """The `n` tokens with the lowest logits, lowest first."""
    return [(token, -value) for token, value in promoted(-logits, tokenizer, n)]


def sentence(adapter: SaeLora, labels: Mapping[int, str], *, n: int = 3) -> list[str]:
    """A sentence for each rank: `when ⟨operator⟩ 61 % or ⟨number⟩ 20 % then more ⟨french⟩ 55 %,
    less ⟨english⟩ 31 %`.

    Percentages are shares of the squared weights that the pathway reads, or writes. Latents of
    one label and one sign are one.

    Args:
        labels: names of latents; one that has none is `latent 17`.
        n: labels in each of the four places.
    """
    return [_sentence(path, labels, n) for path in pathways(adapter)]


def _sentence(path: Pathway, labels: Mapping[int, str], n: int) -> str:
    when, but_not = (_shares(sign * path.read, labels, n) for sign in (1, -1))
    more, less = (_shares(sign * path.write, labels, n) for sign in (1, -1))
    if not path.scale or not (when or but_not) or not (more or less):
        return "never changes anything"
    condition = f"when {' or '.join(when)}" if when else "when"
    condition += f", and not {' or '.join(but_not)}," if but_not else ""
    effects = [("more", more), ("less", less)]
    return f"{condition} then " + ", ".join(f"{w} {' and '.join(x)}" for w, x in effects if x)


def _shares(weights: Float[Tensor, " d_sae"], labels: Mapping[int, str], n: int) -> list[str]:
    """Labels of the latents of positive weight, the heaviest first."""
    squares = weights.double().square() / weights.double().square().sum().clamp(min=1e-300)
    by_label: dict[str, float] = {}
    for latent in (weights > 0).nonzero()[:, 0].tolist():
        label = labels.get(latent, f"latent {latent}")
        by_label[label] = by_label.get(label, 0.0) + float(squares[latent])
    heaviest = sorted(by_label.items(), key=lambda pair: -pair[1])[:n]
    return [f"⟨{label}⟩ {share:.0%}".replace("%", " %") for label, share in heaviest]
