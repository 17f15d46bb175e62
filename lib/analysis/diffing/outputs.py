"""What two models say differently: from their predictions alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lib.data.corpus import Corpus
from lib.models.patched import TextRows
from lib.models.sites import require_eval


@dataclass(frozen=True, eq=False)
class OutputDifference:
    """Of every real token of a corpus, row by row, what its prediction says; nats.

    A row's first token has no prediction: 0.
    """

    kl: Float[Tensor, " n"]
    """KL of model a's prediction of this token from model b's, `Σ p_b log(p_b / p_a)`."""
    rise: Float[Tensor, " n"]
    """By how much b finds the token itself likelier: `log p_b - log p_a`."""
    by_word: Float[Tensor, " vocab"]
    """The sum of `kl` split over what is predicted: `p_b log(p_b / p_a)` of each token id. Largest
    for what b says and a does not."""

    def words(self, n: int) -> Int[Tensor, " n"]:
        """The token ids with most of the KL, most first."""
        return self.by_word.topk(n).indices


@torch.no_grad()
def output_difference(
    a: PreTrainedModel, b: PreTrainedModel, corpus: Corpus, *, batch_rows: int = 64
) -> OutputDifference:
    """One forward pass of each model over a corpus of their common tokenizer.

    Raises:
        ValueError: models with vocabularies of different sizes, or one in training mode.
    """
    for model in (a, b):
        require_eval(model)
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"need models of one vocabulary, got {sizes[0]} and {sizes[1]} tokens")
    kl, rise = [], []
    by_word = torch.zeros(sizes[0], dtype=torch.double)
    for start in range(0, len(corpus.ids), batch_rows):
        rows = TextRows.of(corpus, slice(start, start + batch_rows), False)
        log_a, log_b = (rows.logits(m)[:, :-1].float().log_softmax(2).cpu() for m in (a, b))
        parts = log_b.exp() * (log_b - log_a)
        by_word += parts[rows.predicted].sum(0).double()
        own = rows.ids[:, 1:, None]
        for found, values in ((kl, parts.sum(2)), (rise, (log_b - log_a).gather(2, own)[..., 0])):
            scores = torch.zeros(rows.ids.shape)
            scores[:, 1:] = values
            found.append(scores[rows.mask])
    return OutputDifference(torch.cat(kl), torch.cat(rise), by_word.float())
