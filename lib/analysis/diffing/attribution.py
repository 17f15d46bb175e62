"""Which latents of a crosscoder carry the change of the predictions: one backward pass."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary
from lib.models.patched import TextRows
from lib.models.sites import frozen, read, replace, require_eval
from lib.sparse.ops import dots_at, sum_by_latent


def delta_attribution(
    crosscoder: Dictionary,
    a: nn.Module,
    b: nn.Module,
    hook_name: str,
    corpus: Corpus,
    *,
    skip_special: bool = False,
    batch_rows: int = 64,
) -> Float[Tensor, "d_sae"]:
    """Nats of the KL gap that each latent would close, to first order; largest for what b adds.

    The gap is the KL of b's predictions from those of b's upper layers on a's activations. Latent
    j moves token t by `z_j (d_j^b - d_j^a)`; times minus the gap's gradient there, summed over
    tokens and divided by their number. Source: attribution patching, Nanda 2023, on the difference
    of two models.

    Args:
        skip_special: leave special tokens out, as the crosscoder's training did.

    Raises:
        ValueError: a crosscoder of other sites than two of one width, or a model in training mode.
    """
    dims = crosscoder.config.site_dims
    if len(dims) != 2 or dims[0] != dims[1]:
        raise ValueError(f"need a crosscoder of two sites of one width, got {dims}")
    for model in (a, b):
        require_eval(model)
    rows = crosscoder.decoder_rows.detach()
    apart = (rows[:, dims[0] :] - rows[:, : dims[0]]).contiguous()
    total, n = torch.zeros(crosscoder.d_sae, dtype=torch.double), 0
    for start in range(0, len(corpus.ids), batch_rows):
        text = TextRows.of(corpus, slice(start, start + batch_rows), skip_special)
        acts = []
        with torch.no_grad():
            for model in (a, b):
                with read(model, [hook_name]) as found:
                    logits = text.logits(model)
                acts.append(found[hook_name])
            target = logits[:, :-1][text.predicted].float().log_softmax(1)
        leaf = acts[0].detach().clone().requires_grad_()
        with torch.enable_grad(), frozen(b), replace(b, hook_name, lambda _, leaf=leaf: leaf):
            moved = text.logits(b)[:, :-1][text.predicted].float().log_softmax(1)
            (target.exp() * (target - moved)).sum().backward()
        gradient = leaf.grad[text.patched].float().contiguous()
        x = torch.cat([part[text.patched] for part in acts], dim=1).float()
        with torch.no_grad():
            z = crosscoder.encode_sparse(x)
            total -= sum_by_latent(z, dots_at(z, gradient, apart) * z.values).double().cpu()
        n += int(text.predicted.sum())
    return (total / n).float()
