"""One scale for all methods: where, what, and what it does."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.data.corpus import Corpus
from lib.models.patched import TextRows
from lib.models.sites import read, replace, require_eval
from lib.world import CONCEPTS, concept_matrix

Move = Callable[[Float[Tensor, "n d"], Float[Tensor, "n d"]], Float[Tensor, "n d"]]
"""From a's and b's activations to a's, moved along what a method found."""


def auc(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Chance that a true token has a higher score than another one; ties count half.

    Raises:
        ValueError: the truth is all yes or all no.
    """
    n_true, n = int(truth.sum()), len(truth)
    if not 0 < n_true < n:
        raise ValueError(f"need tokens of both kinds, got {n_true} true ones of {n}")
    _, group, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # of equal scores their mean
    total = ranks[group][truth].sum().item()
    return (total - n_true * (n_true + 1) / 2) / (n_true * (n - n_true))


def precision_at(n: int, scores: Float[Tensor, " m"], truth: Bool[Tensor, " m"]) -> float:
    """Share of true ones among the `n` tokens of highest score."""
    return truth[scores.topk(min(n, len(scores))).indices].double().mean().item()


def concept_ranking(
    scores: Float[Tensor, " n"], concepts: Int[Tensor, " n"], *, min_tokens: int = 20
) -> list[tuple[str, float]]:
    """Concepts of the world by how much of the score's mass lies on their tokens, best first.

    Ranked by the cosine of the score, clamped at 0, and the concept's tokens, both less their
    means: a concept on all tokens gains nothing from holding all of the mass.

    Args:
        concepts: bit masks over `CONCEPTS`.
        min_tokens: concepts on fewer tokens are left out.
    """
    table = torch.from_numpy(concept_matrix(concepts.tolist())).double()
    mass = scores.double().clamp(min=0)
    mass, centred = mass - mass.mean(), table - table.mean(0)
    cosines = (mass @ centred) / (mass.norm() * centred.norm(dim=0)).clamp(min=1e-12)
    usual = [i for i, n in enumerate(table.sum(0).tolist()) if n >= min_tokens]
    return sorted(((CONCEPTS[i], cosines[i].item()) for i in usual), key=lambda pair: -pair[1])


@torch.no_grad()
def gap_closed(
    a: nn.Module,
    b: nn.Module,
    hook_name: str,
    corpus: Corpus,
    moves: Sequence[Move],
    *,
    counted: Bool[Tensor, "rows seq"] | None = None,
    back: bool = False,
    skip_special: bool = False,
    batch_rows: int = 64,
) -> list[float]:
    """Share of the KL gap that moving a's activations closes, read through b's upper layers.

    b predicts from its own activations, from a's (the gap), and from a's moved: 1 minus the last
    KL over the gap. So handing over all of the difference closes exactly 1.

    Args:
        moves: as `Move`, on all real tokens of some rows.
        counted: tokens whose predictions count; None: all.
        back: take what a move would hand over away from b instead. The gap is then that of b from
            a's activations read through b's upper layers, and 1 says that nothing of it is left.
        skip_special: leave special tokens as they are, for findings that never saw them. Handing
            over all of the rest may then close less than 1.

    Raises:
        ValueError: no prediction is counted, the models agree on all of them, or one is in
            training mode.
    """
    for model in (a, b):
        require_eval(model)
    sums = torch.zeros(len(moves) + 1, dtype=torch.double)
    for start in range(0, len(corpus.ids), batch_rows):
        rows = TextRows.of(corpus, slice(start, start + batch_rows), skip_special)
        chosen = rows.predicted.clone()
        if counted is not None:
            chosen &= counted[start : start + batch_rows, 1 : rows.ids.shape[1]]
        if not chosen.any():
            continue
        acts = []
        for model in (a, b):
            with read(model, [hook_name]) as found:
                logits = rows.logits(model)
            acts.append(found[hook_name][rows.mask])
        x_a, x_b = acts
        free = rows.patched[rows.mask].to(x_a.device)
        placed = [x_a]
        for move in moves:
            moved = x_a.clone()
            moved[free] = move(x_a[free], x_b[free]).to(x_a)
            placed.append(moved)
        target = logits[:, :-1][chosen].float().log_softmax(1)
        if back:
            placed = [x_b, *(x_b - (x - x_a) for x in placed[1:])]
            target = _predicted(b, hook_name, rows, x_a)[chosen].float().log_softmax(1)
        for i, x in enumerate(placed):
            moved = _predicted(b, hook_name, rows, x)[chosen].float().log_softmax(1)
            sums[i] += (target.exp() * (target - moved)).sum().double().cpu()
    if not sums[0] > 0:
        raise ValueError("need predictions on which the models differ, got none")
    return (1 - sums[1:] / sums[0]).tolist()


def _predicted(
    model: nn.Module, hook_name: str, rows: TextRows, x: Float[Tensor, "n d"]
) -> Float[Tensor, "rows seq vocab"]:
    """Logits with `x` in the place of the real tokens' activations."""

    def put(old: Tensor) -> Tensor:
        new = old.clone()
        new[rows.mask] = x.to(new)
        return new

    with replace(model, hook_name, put):
        return rows.logits(model)[:, :-1]
