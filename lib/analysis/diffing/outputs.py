"""What two models say differently: from their predictions alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.data.corpus import Corpus
from lib.models.families import hugging_face
from lib.models.patched import TextRows
from lib.models.sites import require_eval


@dataclass(frozen=True, eq=False)
class OutputDifference:
    """Of every real token of a corpus, row by row, what its prediction says; nats.

    A row's first token has no prediction: 0.
    """

    kl: Float[Tensor, " n"]
    """KL of model a's prediction of this token from model b's, `Σ p_b log(p_b / p_a)`."""
    by_word: Float[Tensor, " vocab"]
    """The sum of `kl` split over what is predicted: `p_b log(p_b / p_a)` of each token id. Largest
    for what b says and a does not."""
    top: Int[Tensor, " n_top"]
    """The tokens of largest `kl`, most first."""
    excess: Float[Tensor, "n_top vocab"]
    """Of these `p_b log(p_b / p_a)` of each token id where b finds it likelier, else 0."""


@torch.no_grad()
def output_difference(
    a: nn.Module,
    b: nn.Module,
    corpus: Corpus,
    *,
    n_top: int = 500,
    batch_rows: int = 64,
) -> OutputDifference:
    """One forward pass of each model over a corpus of their common tokenizer.

    Args:
        n_top: tokens whose `excess` is kept.

    Raises:
        ValueError: models with vocabularies of different sizes, or one in training mode.
    """
    for model in (a, b):
        require_eval(model)
    sizes = [hugging_face(m).get_output_embeddings().weight.shape[0] for m in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"need models of one vocabulary, got {sizes[0]} and {sizes[1]} tokens")
    kl, top, excess = [], torch.zeros(0, dtype=torch.long), torch.zeros(0, sizes[0])
    n_before = 0
    by_word = torch.zeros(sizes[0], dtype=torch.double)
    for start in range(0, len(corpus.ids), batch_rows):
        rows = TextRows.of(corpus, slice(start, start + batch_rows), False)
        log_a, log_b = (rows.logits(m)[:, :-1].float().log_softmax(2).cpu() for m in (a, b))
        parts = log_b.exp() * (log_b - log_a)
        by_word += parts[rows.predicted].sum(0).double()
        scores = torch.zeros(rows.ids.shape)
        scores[:, 1:] = parts.sum(2)
        kl.append(scores[rows.mask])
        # a row's first token has no prediction: its excess is none
        own = torch.zeros(*rows.ids.shape, sizes[0])
        own[:, 1:] = parts.clamp(min=0)
        best = kl[-1].topk(min(n_top, len(kl[-1]))).indices
        top, excess = torch.cat([top, best + n_before]), torch.cat([excess, own[rows.mask][best]])
        n_before += len(kl[-1])
        order = torch.cat(kl)[top].topk(min(n_top, len(top))).indices
        top, excess = top[order], excess[order]
    return OutputDifference(torch.cat(kl), by_word.float(), top, excess)
