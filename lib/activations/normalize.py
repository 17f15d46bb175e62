"""Inputs of a dictionary brought to a common scale: `(x - mean) * scale`, and back.

Being affine per dimension, it can be folded into a dictionary's weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

KINDS = ("none", "mean_norm", "per_dim")


@dataclass(frozen=True, eq=False)
class Normalizer:
    """`x -> (x - mean) * scale`; half-precision `x` comes out in float32."""

    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, " d_in"]

    @classmethod
    def fit(cls, kind: str, x: Float[Tensor, "n d_in"], site_dims: tuple[int, ...]) -> "Normalizer":
        """Fit on a sample of tokens; computed in float64, kept in float32 on the device of `x`.

        Args:
            kind: `none`; `mean_norm` scales each site so that its mean norm is sqrt(d_site);
                `per_dim` gives each dimension mean 0 and standard deviation 1, and a constant
                dimension mean 0.

        Raises:
            ValueError: an unknown kind, `site_dims` that do not add up to `d_in`, no token
                (`per_dim`: fewer than two), NaN or infinity, a site that is zero at every token.
        """
        if kind not in KINDS:
            raise ValueError(f"need normalisation in {list(KINDS)}, got {kind!r}")
        n, d_in = x.shape
        if sum(site_dims) != d_in:
            raise ValueError(f"need site_dims that add up to {d_in}, got {site_dims}")
        needed = {"none": 0, "mean_norm": 1, "per_dim": 2}[kind]
        if n < needed:
            raise ValueError(f"need at least {needed} tokens to fit {kind}, got {n}")
        if not x.isfinite().all():
            raise ValueError("need finite activations to fit a normalisation, got NaN or infinity")
        mean = torch.zeros(d_in, device=x.device)
        if kind == "none":
            return cls(mean, torch.ones_like(mean))
        if kind == "mean_norm":
            return cls(mean, _mean_norm_scale(x, site_dims))
        std, average = torch.std_mean(x.double(), dim=0)
        rounding = 1e-7 * average.abs()  # what float32 makes of a constant
        scale = torch.where(std > rounding, 1 / std, 1.0)
        return cls(average.float(), scale.float())

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return (x - self.mean) * self.scale

    def inverse(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The activations that were normalised to `x`."""
        return x / self.scale + self.mean

    def to(self, device: torch.device | str) -> "Normalizer":
        return Normalizer(self.mean.to(device), self.scale.to(device))


def _mean_norm_scale(
    x: Float[Tensor, "n d_in"], site_dims: tuple[int, ...]
) -> Float[Tensor, " d_in"]:
    scales = []
    for site, part in enumerate(x.split(site_dims, dim=1)):
        norm = part.double().norm(dim=1).mean()
        if norm == 0:
            raise ValueError(f"site {site} is zero at every token; need activations to scale")
        scales.append((part.shape[1] ** 0.5 / norm).expand(part.shape[1]))
    return torch.cat(scales).float()
