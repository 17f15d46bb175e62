"""The loss of nested dictionaries."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.losses import StepOutput
from lib.sparse import SparseActs, sparse_decode


@dataclass(frozen=True, kw_only=True)
class PrefixReconstruction:
    """Mean squared error of nested prefixes of the latents, the whole among them. Source:
    Bussmann et al. 2025, Matryoshka SAEs, arXiv:2503.17547."""

    shares: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Length of each prefix as a share of d_sae; ascending, the last is 1."""

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip((0, *self.shares), self.shares, strict=False))
        if not ascending or self.shares[-1] != 1:
            raise ValueError(f"need shares that ascend from above 0 to 1, got {self.shares}")

    def check(self, config: DictionaryConfig) -> None:
        if config.exclusive or config.code_norm == "decoupled":
            raise ValueError(
                "nested prefixes go with neither exclusive latents nor decoupled norms"
            )

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        bounds = [round(share * out.dictionary.d_sae) for share in self.shares]
        starts = (0, *bounds[:-1])
        sizes = [stop - start for start, stop in zip(starts, bounds, strict=True)]
        left, total = out.target - out.dictionary.b_dec, 0.0
        for start, rows in zip(starts, out.dictionary.decoder_rows.split(sizes), strict=True):
            left = left - _decoded(out.acts, start, rows)
            total = total + left.square().sum(1).mean()
        return total / len(bounds)


def _decoded(
    acts: SparseActs | Float[Tensor, "n d_sae"], start: int, rows: Float[Tensor, "m d_out"]
) -> Float[Tensor, "n d_out"]:
    """What the latents from `start` on decode to, given as many decoder rows."""
    stop = start + len(rows)
    if not isinstance(acts, SparseActs):
        return acts[:, start:stop] @ rows
    part = acts.where((acts.indices >= start) & (acts.indices < stop))
    part = SparseActs(part.indices - start, part.values, part.offsets, len(rows))
    return sparse_decode(part, rows)
