"""Soft whitening: activations decorrelated and brought to a common scale."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lib.activations.moments import Moments

TRACE_KEPT = 0.99
ALPHA_SHARE = 0.01
ROUNDING = 1e-7  # relative standard deviation that float32 makes of a constant
MAX_TOKENS = 1_000_000  # that a covariance is estimated from


@dataclass(frozen=True, eq=False)
class Whitener:
    """`x̃ = U (Λ + αI)^(-1/2) Uᵀ (x - mean)`, where `Σ = U Λ Uᵀ` is the covariance.

    The covariance of x̃ is Σ(Σ + αI)⁻¹: near 1 in directions of variance well above α, near 0 well
    below. α is a hundredth of the k-th largest eigenvalue, k the smallest rank that holds 99 % of
    the trace, so that directions of next to no variance are not blown up into noise.

    At low rank `vectors` are the k largest only, and all that they leave out counts as isotropic:
    `(Σ + αI)^p = V (Λ + α)^p Vᵀ + (rest + α)^p (I - V Vᵀ)`, p = -1/2, at O(n d_in k) for n tokens.

    Half-precision input comes out in float32.

    Source: ZCA, Bell and Sejnowski 1997, The independent components of natural scenes are edge
    filters; α softens it.

    Raises:
        ValueError: tensors that do not fit together, NaN or infinity, a negative eigenvalue or
            `rest`, an `alpha` that is not positive.
    """

    mean: Float[Tensor, " d_in"]
    vectors: Float[Tensor, "d_in k"]
    """Orthonormal eigenvectors of the covariance, as columns; k = d_in unless low rank."""
    values: Float[Tensor, " k"]
    """Their eigenvalues, descending, none negative."""
    rest: float
    """Mean eigenvalue of what `vectors` leave out; 0.0 at full rank."""
    alpha: float
    """Added to each eigenvalue, in units of variance."""
    n_tokens: int
    """Tokens that mean and covariance come from."""

    def __post_init__(self) -> None:
        d_in, k = len(self.mean), len(self.values)
        if self.vectors.shape != (d_in, k) or k > d_in:
            raise ValueError(
                f"need vectors [{d_in}, {k}] and k <= d_in, got {list(self.vectors.shape)}"
            )
        for name in ("mean", "vectors", "values"):
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"need finite {name}, got NaN or infinity")
        if (self.values < 0).any():
            raise ValueError(f"need values >= 0, got {float(self.values.min())}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"need a finite alpha > 0, got {self.alpha}")
        if not 0 <= self.rest < float("inf"):
            raise ValueError(f"need a finite rest >= 0, got {self.rest}")

    @classmethod
    @torch.no_grad()
    def fit(cls, moments: Moments, *, full_up_to: int = 4096) -> "Whitener":
        """Eigenpairs in float64, kept in float32 on the device of `moments`.

        Args:
            full_up_to: a wider `d_in` gets the low-rank form.

        Raises:
            ValueError: fewer than two tokens, or the same activations at every token.
        """
        require_varying(moments)
        values, vectors = torch.linalg.eigh(moments.covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        sums, d_in = values.cumsum(0), len(values)
        k = int((sums < TRACE_KEPT * sums[-1]).sum()) + 1
        kept = d_in if d_in <= full_up_to else k
        return cls(
            mean=moments.mean.float(),
            vectors=vectors[:, :kept].float().contiguous(),
            values=values[:kept].float(),
            rest=float(values[kept:].mean()) if kept < d_in else 0.0,
            alpha=ALPHA_SHARE * float(values[k - 1]),
            n_tokens=moments.count,
        )

    @classmethod
    def centring(cls, moments: Moments) -> "Whitener":
        """Whitens nothing: centres, and scales all directions alike, to mean variance 1."""
        require_varying(moments)
        d_in = len(moments.mean)
        spread = moments.variance.mean().item()
        eye = torch.eye(d_in, device=moments.mean.device)
        values = torch.full((d_in,), spread, device=moments.mean.device)
        return cls(moments.mean.float(), eye, values, 0.0, 1e-6 * spread, moments.count)

    @property
    def total_variance(self) -> float:
        """The trace of the covariance."""
        left_out = len(self.mean) - len(self.values)
        return self.values.double().sum().item() + left_out * self.rest

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return self.fold(x - self.mean)

    def fold(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Encoder rows that read x̃, made to read `x - mean`: `rows (Σ + αI)^(-1/2)`."""
        dtype = torch.promote_types(rows.dtype, self.mean.dtype)
        rows = rows.to(dtype)
        if len(self.values) == len(self.mean):
            return rows @ self._inverse_root.to(dtype)
        vectors, values = self.vectors.to(dtype), self.values.to(dtype)
        outside = (self.rest + self.alpha) ** -0.5
        inside = (values + self.alpha) ** -0.5
        return rows * outside + (rows @ vectors * (inside - outside)) @ vectors.T

    def to(self, device: torch.device | str) -> "Whitener":
        tensors = (x.to(device) for x in (self.mean, self.vectors, self.values))
        return Whitener(*tensors, self.rest, self.alpha, self.n_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors, for safetensors."""
        return {
            "mean": self.mean.clone(),
            "vectors": self.vectors.clone(memory_format=torch.contiguous_format),
            "values": self.values.clone(),
            "rest": torch.tensor(self.rest, dtype=torch.float64),
            "alpha": torch.tensor(self.alpha, dtype=torch.float64),
            "n_tokens": torch.tensor(self.n_tokens),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Whitener":
        """Raises KeyError if a tensor is missing, ValueError if they do not fit together."""
        tensors = (state[name] for name in ("mean", "vectors", "values"))
        numbers = (state[name].item() for name in ("rest", "alpha", "n_tokens"))
        return cls(*tensors, *numbers)

    @cached_property
    def _inverse_root(self) -> Float[Tensor, "d_in d_in"]:
        """`(Σ + αI)^(-1/2)` at full rank, computed in float64."""
        vectors = self.vectors.double()
        scale = (self.values.double() + self.alpha) ** -0.5
        return (vectors * scale @ vectors.T).to(self.mean)


@torch.no_grad()
def calibrate(batches: Iterator[Float[Tensor, "n d_in"]], *, tolerance: float = 1e-3) -> Moments:
    """Mean and covariance of as much of a stream as it takes for the covariance to settle.

    Reads at least `2 d_in` tokens, until a batch changes the covariance by less than `tolerance`
    or `MAX_TOKENS` were seen; no batch beyond that is drawn. The change is relative, in Frobenius
    norm. Of shuffled tokens it falls as √batch / tokens, so larger batches take longer; one smaller
    than the largest so far (the last of a file) is judged together with those after it. In memory
    the gate costs one `[d_in d_in]` matrix beside those of `Moments`.

    Raises:
        ValueError: the stream ends before that; the same activations at every token; NaN or
            infinity; a batch of another width.
    """
    moments = previous = None
    change, needed = float("inf"), 2
    largest = pending = 0
    for x in batches:
        if moments is None:
            moments = Moments(x.shape[1], x.device)
            needed = 2 * x.shape[1]
        moments.update(x)
        largest, pending = max(largest, len(x)), pending + len(x)
        if pending >= largest and moments.count >= 2:
            pending = 0
            covariance = moments.covariance
            if previous is not None:
                change = float(previous.sub_(covariance).norm() / covariance.norm())
            previous = covariance
        if moments.count >= needed:
            require_varying(moments)
            if change < tolerance or moments.count >= MAX_TOKENS:
                return moments
    n_tokens = 0 if moments is None else moments.count
    if n_tokens < needed:
        raise ValueError(f"too few tokens to calibrate: need at least {needed}, got {n_tokens}")
    raise ValueError(
        f"too few tokens to calibrate: after {n_tokens} the last batch changed the covariance by "
        f"{change:.1e} of its norm; need below {tolerance:.1e}: more tokens or a larger tolerance"
    )


def require_varying(moments: Moments) -> None:
    """Raises ValueError if all tokens have the same activations, up to float32's rounding."""
    variance, size = moments.variance.sum(), moments.mean.square().sum()
    if variance <= ROUNDING**2 * size:
        raise ValueError(
            f"need activations that vary, got the same at each of {moments.count} tokens"
        )
