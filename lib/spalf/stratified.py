"""A dictionary whose first latents write known token directions, the rest whatever they learn."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.rules import JumpReLU
from lib.spalf.whitening import Whitener

CHUNK = 1024  # latents whose quantiles are taken at a time
IQR_SHARE = 1.5  # bandwidth in interquartile ranges of a pre-activation


@dataclass(frozen=True, eq=False)
class Anchors:
    """Token directions that the first decoder rows start at."""

    ids: Int[Tensor, " V"]
    """Token of each row."""
    rows: Float[Tensor, "V d"]
    """Unembedding rows, the final norm's scale folded in; their length does not matter."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.rows):
            raise ValueError(f"need an id a row, got {len(self.ids)} and {len(self.rows)} rows")
        norms = self.rows.norm(dim=1)
        good = (norms.isfinite() & (norms > 0)).to(self.ids.device)
        if not good.all():
            bad = self.ids[~good].tolist()
            raise ValueError(f"need finite anchors that are not 0, got others for ids {bad[:5]}")


class StratifiedDictionary(Dictionary):
    """A JumpReLU dictionary in training: reads whitened activations, writes centred, scaled ones.

    Rows below `n_anchored` start at unit anchors and are free to change their length; the rest are
    kept at unit length. `folded_out` gives the plain `Dictionary` of raw activations.
    """

    def __init__(
        self, d_sae: int, d_in: int, anchors: Float[Tensor, "V d_in"] | None = None, **names
    ) -> None:
        """
        Args:
            names: `hook_names` and `model_name`, as in `DictionaryConfig`.

        Raises:
            ValueError: `d_sae` does not leave a free latent beside the anchors, or their width is
                not `d_in`.
        """
        rows = torch.zeros(0, d_in) if anchors is None else anchors
        if rows.shape[1] != d_in:
            raise ValueError(f"need anchors of width {d_in}, got {rows.shape[1]}")
        if d_sae <= len(rows):
            raise ValueError(f"need d_sae above the {len(rows)} anchored latents, got {d_sae}")
        config = DictionaryConfig(
            site_dims=(d_in,),
            d_sae=d_sae,
            rule=JumpReLU(),
            unit_norm_decoder=not len(rows),
            apply_b_dec_to_input=False,
            **names,
        )
        super().__init__(config)
        self.register_buffer("anchors", rows / rows.norm(dim=1, keepdim=True))
        self.register_buffer("bandwidth", torch.ones(d_sae))

    @property
    def n_anchored(self) -> int:
        return len(self.anchors)

    @torch.no_grad()
    def start(
        self, x: Float[Tensor, "n d_in"], whitener: Whitener, scale: float, l0_target: float
    ) -> None:
        """Calibrate on raw activations `x`: rows, matched filters, thresholds, bandwidths.

        The encoder row of decoder row d is its matched filter in whitened space, `d̃ / ‖d̃‖²`: a
        token that is `z` times d has the pre-activation z, and among all such filters this one
        passes least of everything else. (The decoder itself, transposed, leaves a quarter of the
        latents dead.) Each threshold is where its latent fires on `l0_target /
        d_sae` of the tokens.
        """
        whitener, x = whitener.to(x.device), x.to(self.W_dec)
        free = gram_schmidt(self.W_dec[self.n_anchored :], self.anchors)
        self.W_dec.copy_(torch.cat([self.anchors, free]))
        self.W_enc.copy_(matched_filters(self.W_dec, whitener).T * scale)
        reads = whitener(x)
        for part in torch.arange(self.d_sae, device=x.device).split(CHUNK):
            pre = reads @ self.W_enc[:, part]
            shares = pre.new_tensor([0.25, 0.75, 1 - l0_target / self.d_sae])
            low, high, threshold = torch.quantile(pre, shares, dim=0)
            spread = (high - low).clamp(min=1e-6)
            self.bandwidth[part] = IQR_SHARE * spread
            self.log_threshold[part] = threshold.clamp(min=1e-3 * spread).log()

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Divide every free row by its norm."""
        free = self.W_dec[self.n_anchored :]
        free /= free.norm(dim=1, keepdim=True).clamp(min=1e-12)

    @torch.no_grad()
    def project_decoder_grad_(self) -> None:
        """Remove from each free row's gradient what would change only the row's norm."""
        free, grad = self.W_dec[self.n_anchored :], self.W_dec.grad
        if grad is not None:
            grad = grad[self.n_anchored :]
            grad -= (grad * free).sum(1, keepdim=True) * free

    @torch.no_grad()
    def folded_out(self, whitener: Whitener, scale: float) -> Dictionary:
        """The dictionary of raw activations x that does what this one does on whitened ones, in
        the unit of x; `scale` is that of the output, `(x - mean) * scale`."""
        whitener = whitener.to(self.W_dec.device)
        threshold, bandwidth = self.log_threshold.exp() / scale, self.bandwidth / scale
        rule = JumpReLU(threshold=threshold.mean().item(), bandwidth=bandwidth.mean().item())
        config = DictionaryConfig(
            site_dims=self.config.site_dims,
            d_sae=self.d_sae,
            rule=rule,
            hook_names=self.config.hook_names,
            unit_norm_decoder=self.config.unit_norm_decoder,
            apply_b_dec_to_input=False,
            model_name=self.config.model_name,
        )
        with torch.random.fork_rng(devices=[]):  # its random rows are not kept
            raw = Dictionary(config).to(self.W_dec.device)
        raw.W_enc.copy_(whitener.fold(self.encoder_rows).T / scale)
        raw.b_enc.copy_(self.b_enc / scale - whitener.mean @ raw.W_enc)
        raw.W_dec.copy_(self.W_dec)
        raw.b_dec.copy_(self.b_dec / scale + whitener.mean)
        raw.log_threshold.copy_(threshold.log())
        return raw.eval()


def matched_filters(rows: Float[Tensor, "m d"], whitener: Whitener) -> Float[Tensor, "m d"]:
    """Encoder rows on whitened activations: `d̃ / ‖d̃‖²`, where d̃ is the whitened row d."""
    whitened = whitener.fold(rows)
    return whitened / whitened.square().sum(1, keepdim=True)


def gram_schmidt(rows: Float[Tensor, "m d"], against: Float[Tensor, "V d"]) -> Tensor:
    """Unit rows, orthogonal to each other within blocks of at most d.

    The first block is orthogonal to `against` too, as far as the width leaves room.
    """
    d = rows.shape[1]
    room = max(0, d - len(against))
    first = torch.linalg.qr(torch.cat([against, rows[:room]]).T).Q.T[len(against) :]
    blocks = [first] if room else []
    blocks += [torch.linalg.qr(part.T).Q.T for part in rows[room:].split(d) if len(part)]
    return torch.cat(blocks)
