"""Statistics of activations: mean and covariance of a stream, and the normaliser of inputs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lib.runtime import require_at_least

KINDS = ("none", "mean_norm", "per_dim")


class Moments:
    """Mean and covariance of what went through `update`, whatever its batches were.

    Keeps the mean and the sum of products of deviations from it, so a mean far from zero costs no
    digits. Source: Welford 1962; merging as in Chan, Golub and LeVeque 1983.
    """

    def __init__(self, d_in: int, device: torch.device | str = "cpu") -> None:
        require_at_least(1, d_in=d_in)
        self.count = 0
        self.mean: Float[Tensor, " d_in"] = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._products = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "n d_in"]) -> None:
        """Add the rows of `x`.

        Raises:
            ValueError: another width, NaN or infinity; nothing was added then.
        """
        self._require_width(x.shape[1])
        x = x.to(self.mean)
        if not x.isfinite().all():
            raise ValueError("need finite activations, got NaN or infinity")
        if len(x):
            mean, total = x.mean(dim=0), self.count + len(x)
            deviations, shift = x - mean, mean - self.mean
            self._products += deviations.T @ deviations
            self._products.addr_(shift, shift, alpha=self.count * len(x) / total)
            self.mean = self.mean + shift * (len(x) / total)
            self.count = total

    def _require_width(self, width: int) -> None:
        if width != len(self.mean):
            raise ValueError(f"need width {len(self.mean)}, got {width}")

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """Unbiased: divided by `count - 1`.

        Raises:
            ValueError: fewer than two tokens were seen.
        """
        return self._products / self._degrees()

    @property
    def variance(self) -> Float[Tensor, " d_in"]:
        """The diagonal of `covariance`."""
        return self._products.diagonal() / self._degrees()

    def _degrees(self) -> int:
        if self.count < 2:
            raise ValueError(f"need at least two tokens for a variance, got {self.count}")
        return self.count - 1

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors, for safetensors."""
        count = torch.tensor(self.count)
        return {"count": count, "mean": self.mean.clone(), "products": self._products.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError if `state` is of another width."""
        self._require_width(len(state["mean"]))
        self.count = int(state["count"])
        self.mean = state["mean"].to(self.mean, copy=True)
        self._products = state["products"].to(self.mean, copy=True)


@dataclass(frozen=True, eq=False)
class Normalizer:
    """`x -> (x - mean) * scale`, which folds into a dictionary's weights; float32 or wider."""

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
