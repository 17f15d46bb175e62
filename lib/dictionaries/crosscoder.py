"""Loss terms and recipes of crosscoders: dictionaries of two or more sites."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.losses import AuxK, Reconstruction, StepOutput
from lib.dictionaries.recipes import Recipe
from lib.dictionaries.rules import BatchTopK
from lib.sparse import SparseActs


@dataclass(frozen=True, kw_only=True)
class DifferenceReconstruction:
    """`weight` times the squared error of the difference of two sites, beside `Reconstruction`.

    What two models share costs a crosscoder most of its latents; this term pays for the rest.
    """

    weight: float = 1.0

    def check(self, config: DictionaryConfig) -> None:
        dims = config.out_dims or config.site_dims
        if len(dims) != 2 or dims[0] != dims[1]:
            raise ValueError(f"need two sites of one width for their difference, got {dims}")

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        a, b = out.error.chunk(2, dim=1)
        return self.weight * (b - a).square().sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class ExclusiveL1:
    """`weight` times the sum of a partition's exclusive latents, each times its code norm.

    Beside L1 it leaves the shared latents the smaller penalty. Source: designated shared features,
    Mishra-Sharma et al. 2025, Insights on Crosscoder Model Diffing (Transformer Circuits).
    """

    weight: float

    def check(self, config: DictionaryConfig) -> None:
        if not config.exclusive:
            raise ValueError("need exclusive latents for ExclusiveL1, got none")

    def __call__(self, out: StepOutput) -> Float[Tensor, ""]:
        norms = out.dictionary.code_norms().clone()
        norms[sum(out.dictionary.config.exclusive) :] = 0
        if isinstance(out.acts, SparseActs):
            return self.weight * (out.acts.values * norms[out.acts.indices]).sum() / len(out.x)
        return self.weight * (out.acts @ norms).mean()


def delta(k: int = 32, weight: float = 1.0, k_start: int | None = None) -> Recipe:
    """`batchtopk` of two sites whose difference must be reconstructed too."""
    terms = (Reconstruction(), DifferenceReconstruction(weight=weight), AuxK())
    return Recipe(rule=BatchTopK(k=k, k_start=k_start), terms=terms)
