"""A model with an activation rebuilt at some tokens, and what that costs it as a training loss."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib.data.corpus import Corpus
from lib.models.sites import frozen, replace, require_eval, site_dim, split_head
from lib.runtime import require_at_least

Rebuild = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]


class TextRows(NamedTuple):
    """Some rows of a corpus, without columns of padding only."""

    ids: Int[Tensor, "rows seq"]
    mask: Bool[Tensor, "rows seq"]
    patched: Bool[Tensor, "rows seq"]
    """Tokens whose activations are rebuilt."""

    @classmethod
    def of(cls, corpus: Corpus, rows: Tensor | slice, skip_special: bool) -> "TextRows":
        mask = corpus.mask[rows]
        width = int(mask.any(0).sum())
        patched = mask & ~corpus.special[rows] if skip_special else mask
        return cls(*(x[:, :width] for x in (corpus.ids[rows].long(), mask, patched)))

    @property
    def predicted(self) -> Bool[Tensor, "rows seq_minus_1"]:
        """Tokens whose next one is real."""
        return self.mask[:, 1:] & self.mask[:, :-1]

    def logits(self, model: nn.Module) -> Float[Tensor, "rows seq vocab"]:
        ids, mask = self.ids.to(model.device), self.mask.long().to(model.device)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def patch(self, hook_name: str, rebuild: Rebuild) -> Callable[[Tensor], Tensor]:
        """Puts `rebuild` of the patched tokens' activations, float32 and detached, in their place.

        At `hook_z` the heads are flattened; at `hook_z.3` head 3 alone is rebuilt.

        Raises:
            ValueError: when called, if `rebuild` changed the shape.
        """
        head = split_head(hook_name)[1]

        def edit(x: Tensor) -> Tensor:
            y, tokens = x.detach().clone(), self.patched.to(x.device)
            part = y if head is None else y[:, :, head]
            chosen = part[tokens]
            given = chosen.flatten(1).float()
            x_hat = rebuild(given)
            if x_hat.shape != given.shape:
                raise ValueError(
                    f"need a rebuilt activation {tuple(given.shape)} at {hook_name}, "
                    f"got {tuple(x_hat.shape)}"
                )
            part[tokens] = x_hat.to(chosen).view_as(chosen)
            return y

        return edit


class PatchedKL:
    """KL of the patched model's predictions from the clean model's, on a few rows a step.

    A call runs the model twice: clean without a graph, then with `rebuild(x)` in the activation's
    place and a graph from there on. Gradients reach what `rebuild` depends on and nothing else.
    The rows are a function of the seed and the step alone, so a resumed run sees the same ones.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        hook_name: str,
        *,
        batch_rows: int = 8,
        seed: int = 0,
        skip_special: bool = True,
    ) -> None:
        """
        Args:
            hook_name: a site of `model`; at `hook_z` the heads are flattened.
            batch_rows: rows of the corpus a step, or all there are; two sets of logits are held.
            skip_special: leave the activations of special tokens as they are, as harvesting does;
                what special tokens cost to predict is counted all the same.

        Raises:
            ValueError: `batch_rows` below 1, a negative seed, an unknown site, a model in training
                mode, or a corpus without a token to predict or to patch.
        """
        require_at_least(1, batch_rows=batch_rows)
        require_at_least(0, seed=seed)
        self.width = site_dim(model, hook_name)
        """Of the activations that `rebuild` gets."""
        require_eval(model)
        patched = corpus.mask & ~corpus.special if skip_special else corpus.mask
        self._usable = (corpus.mask[:, 1:] & corpus.mask[:, :-1]).any(1).nonzero()[:, 0]
        if not len(self._usable):
            raise ValueError("need a corpus with a token to predict, got none")
        if not patched[self._usable].any():
            raise ValueError("need a corpus with a token to patch, got special tokens only")
        self._model, self._corpus, self._hook_name = model, corpus, hook_name
        self._batch_rows, self._seed, self._skip_special = batch_rows, seed, skip_special

    def rows(self, step: int) -> Int[Tensor, " n_rows"]:
        """The rows of the corpus at `step`, each once; only rows with a token to predict.

        Raises:
            ValueError: a negative step.
        """
        require_at_least(0, step=step)
        n = min(self._batch_rows, len(self._usable))
        drawn = np.random.default_rng([self._seed, step]).choice(len(self._usable), n, False)
        return self._usable[torch.from_numpy(drawn)]

    def __call__(self, rebuild: Rebuild, step: int) -> Float[Tensor, ""]:
        """Nats per predicted token, Σ p_clean log(p_clean / p), over the rows of `step`.

        Args:
            rebuild: gets the patched tokens' activations, float32 and detached.

        Raises:
            ValueError: a negative step, a model in training mode, or `rebuild` changed the shape.
        """
        require_eval(self._model)
        rows = TextRows.of(self._corpus, self.rows(step), self._skip_special)
        with torch.no_grad():
            clean = self._logits(rows)
        edit = rows.patch(self._hook_name, rebuild)
        with frozen(self._model), replace(self._model, self._hook_name, edit):
            patched = self._logits(rows)
        return _kl(clean, patched)

    def _logits(self, rows: TextRows) -> Float[Tensor, "n vocab"]:
        logits = rows.logits(self._model)
        return logits[:, :-1][rows.predicted.to(logits.device)]


def _kl(clean: Float[Tensor, "n vocab"], patched: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    log_p, log_q = clean.float().log_softmax(-1), patched.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
