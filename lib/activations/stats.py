"""Mean and covariance of a stream, in float64, in one pass; partial results can be merged."""

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Mean and covariance of what went through `update`, whatever its batches were.

    Keeps the mean and the sum of products of deviations from it, so a mean far from zero costs no
    digits. Source: Welford 1962; merging as in Chan, Golub and LeVeque 1983.
    """

    def __init__(self, d_in: int, device: torch.device | str = "cpu") -> None:
        if d_in < 1:
            raise ValueError(f"need d_in >= 1, got {d_in}")
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
            mean = x.mean(dim=0)
            deviations = x - mean
            self._add(len(x), mean, deviations.T @ deviations)

    def merge(self, other: "Moments") -> None:
        """Add all that `other` has seen."""
        self._require_width(len(other.mean))
        if other.count:
            self._add(other.count, other.mean.to(self.mean), other._products.to(self.mean))

    def _require_width(self, width: int) -> None:
        if width != len(self.mean):
            raise ValueError(f"need width {len(self.mean)}, got {width}")

    def _add(self, n: int, mean: Tensor, products: Tensor) -> None:
        total = self.count + n
        shift = mean - self.mean
        self._products += products
        self._products.addr_(shift, shift, alpha=self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

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
