"""How well a dictionary reconstructs activations, and what the model loses by its errors."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lib.activations.source import Block
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary
from lib.models.patched import TextRows
from lib.models.sites import replace, require_eval, split_head, width_at
from lib.sparse import SparseActs


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """All pooled over tokens; a ratio is one of sums, never a mean of batches' ratios."""

    n_tokens: int
    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 as good as the mean. Gao et al. 2024."""
    cosine: float
    """Mean cosine between x and x_hat."""
    l0: float
    """Mean number of active latents per token."""
    density: Float[Tensor, " n_latents"]
    """Share of tokens on which each latent fires."""
    relative_norm: float
    """Mean of ‖x_hat‖ / ‖x‖; less than 1 is shrinkage, but so is any honest uncertainty."""
    slope: float
    """Regression of x on x_hat, both centred: over 1 where scaling x_hat up would fit better.
    NaN where x_hat never varies."""

    @property
    def r2(self) -> float:
        return 1 - self.fvu

    @property
    def dead(self) -> float:
        """Share of latents that fired on no token."""
        return float((self.density == 0).double().mean())


class ReconstructionSums:
    """The sums that a `Reconstruction` is made of, over any number of batches."""

    def __init__(self, n_latents: int) -> None:
        self.n = 0
        self._fired = torch.zeros(n_latents, dtype=torch.int64)
        self._shift: Tensor | None = None  # near the mean, so that variances lose no digits
        self._sums: dict[str, Tensor] = {}

    def update(
        self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], acts: SparseActs
    ) -> None:
        if not len(x):
            return
        x, x_hat = x.double(), x_hat.to(x.device).double()
        if self._shift is None:
            self._shift = x.mean(0)
        norm, a, b = x.norm(dim=1), x - self._shift, x_hat - self._shift
        batch = {
            "error": (x - x_hat).square().sum(),
            "a": a.sum(0),
            "b": b.sum(0),
            "aa": a.square().sum(),
            "bb": b.square().sum(),
            "ab": (a * b).sum(),
            "cosine": torch.cosine_similarity(x, x_hat, dim=1).sum(),
            "norms": (x_hat.norm(dim=1) / norm)[norm > 0].sum(),
            "nonzero": (norm > 0).sum(),
        }
        self._sums = {name: self._sums.get(name, 0) + value for name, value in batch.items()}
        fired = acts.indices[acts.values != 0]
        self._fired += torch.bincount(fired, minlength=len(self._fired)).cpu()
        self.n += len(x)

    def result(self) -> Reconstruction:
        """Raises ValueError for tokens that have no variance to explain: fewer than two, say."""
        s, n = self._sums, self.n
        variance = float(s["aa"] - s["a"].square().sum() / n) if n else 0.0
        if not variance > 0:
            raise ValueError(f"need activations that vary, got {n} tokens with variance {variance}")
        spread = float(s["bb"] - s["b"].square().sum() / n)
        together = float(s["ab"] - s["a"] @ s["b"] / n)
        return Reconstruction(
            n_tokens=n,
            fvu=float(s["error"]) / variance,
            cosine=float(s["cosine"]) / n,
            l0=int(self._fired.sum()) / n,
            density=self._fired / n,
            relative_norm=float(s["norms"] / s["nonzero"]),
            slope=together / spread if spread > 1e-12 * variance else float("nan"),
        )


@torch.no_grad()
def reconstruction(dictionary: Dictionary, blocks: Iterable[Block]) -> Reconstruction:
    """Encode and decode every block. Raises ValueError for a transcoder, whose target is not x."""
    _require_autoencoder(dictionary)
    sums = ReconstructionSums(dictionary.d_sae)
    for block in blocks:
        acts = dictionary.encode_sparse(block.acts)
        sums.update(block.acts, dictionary.decode(acts), acts)
    return sums.result()


@dataclass(frozen=True)
class PatchedLosses:
    """Nats per predicted token, pooled over the corpus: clean, reconstructed and zero-ablated."""

    n_tokens: int
    ce_clean: float
    ce_patched: float
    ce_zero: float
    kl: float
    """Of the patched model's predictions from the clean one's: Σ p_clean log(p_clean / p)."""
    kl_zero: float

    @property
    def loss_recovered(self) -> float:
        """1 where patching costs nothing, 0 where it costs as much as zeroing the site."""
        return (self.ce_zero - self.ce_patched) / (self.ce_zero - self.ce_clean)

    @property
    def kl_recovered(self) -> float:
        """`1 - kl / kl_zero`; unlike `loss_recovered` it cannot hide errors that cancel."""
        return 1 - self.kl / self.kl_zero


@torch.no_grad()
def patched_losses(
    model: PreTrainedModel,
    dictionary: Dictionary,
    corpus: Corpus,
    hook_name: str,
    *,
    error_term: bool = False,
    skip_special: bool = True,
    batch_rows: int = 16,
) -> PatchedLosses:
    """Cross-entropy and KL with the reconstruction, or zeros, in the activation's place.

    Args:
        hook_name: a site, or a head of one: `blocks.2.attn.hook_z.3`.
        error_term: add what the reconstruction misses. Patching then changes nothing, up to
            rounding: a check of the path.
        skip_special: leave the activations of special tokens as they are, as harvesting does; what
            special tokens cost to predict is counted all the same.
        batch_rows: rows of the corpus at a time; three sets of logits are held.

    Raises:
        ValueError: a dictionary of several sites, a transcoder, another width than the site's, a
            model in training mode, or a corpus without two tokens in a row.
    """
    require_patchable(model, dictionary, hook_name)

    def rebuild(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        x_hat = dictionary.decode(dictionary.encode_sparse(x)).to(x.device)
        return x_hat + (x - x_hat) if error_term else x_hat

    sums, n = torch.zeros(5, dtype=torch.float64), 0
    for start in range(0, len(corpus.ids), batch_rows):
        rows = TextRows.of(corpus, slice(start, start + batch_rows), skip_special)
        logits = [rows.logits(model)]
        for fn in (rebuild, torch.zeros_like):
            with replace(model, split_head(hook_name)[0], rows.patch(hook_name, fn)):
                logits.append(rows.logits(model))
        predicted = rows.predicted.nonzero()
        for part in predicted.split(1024):  # float32 copies of few logits at a time
            at = part[:, 0], part[:, 1]
            sums += _sums([x[at] for x in logits], rows.ids[at[0], at[1] + 1])
        n += len(predicted)
    if not n:
        raise ValueError("need a corpus with a token to predict, got none")
    ce_clean, ce_patched, ce_zero, kl, kl_zero = (sums / n).tolist()
    return PatchedLosses(n, ce_clean, ce_patched, ce_zero, kl, kl_zero)


def drift_fidelity(
    W_dec_rows: Float[Tensor, "V d"], anchors: Float[Tensor, "n_anchors d"]
) -> Float[Tensor, " V"]:
    """Cosine of each anchored decoder row with the token direction that it started at.

    1 is no drift; a row or an anchor of zeros has 0.

    Raises:
        ValueError: another number of rows than of anchors.
    """
    if len(W_dec_rows) != len(anchors):
        raise ValueError(f"need a row for each of {len(anchors)} anchors, got {len(W_dec_rows)}")
    return torch.cosine_similarity(W_dec_rows, anchors, dim=1)


def require_patchable(model: PreTrainedModel, dictionary: Dictionary, hook_name: str) -> None:
    """Raises ValueError for what `patched_losses` cannot patch."""
    _require_autoencoder(dictionary)
    dims = dictionary.config.site_dims
    if len(dims) != 1:
        raise ValueError(f"need a dictionary of one site to patch, got one of {len(dims)}")
    width = width_at(model, hook_name)
    if dims[0] != width:
        raise ValueError(f"need a dictionary of width {width} at {hook_name}, got {dims[0]}")
    require_eval(model)


def _require_autoencoder(dictionary: Dictionary) -> None:
    if dictionary.config.out_dims is not None:
        raise ValueError(
            "need a dictionary that reconstructs its input, got a transcoder with "
            f"out_dims {dictionary.config.out_dims}"
        )


def _sums(logits: list[Float[Tensor, "n vocab"]], targets: Tensor) -> Float[Tensor, "5"]:
    """Three cross-entropies and two divergences from the first, summed over tokens."""
    clean, *others = (x.float().log_softmax(-1) for x in logits)
    targets = targets.to(clean.device)
    nats = [-x.gather(1, targets[:, None]).sum() for x in (clean, *others)]
    nats += [(clean.exp() * (clean - x)).sum() for x in others]
    return torch.stack(nats).double().cpu()
