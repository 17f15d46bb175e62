"""Planted features: does a dictionary find the directions that activations were made of?

The benchmark is sae-lens's: `SyntheticModel` has a `feature_dict` of true directions and an
`activation_generator` of their sparse coefficients. The metrics are sae-lens's too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from sae_lens.synthetic import SyntheticModel


class SyntheticStream(Iterator[Tensor]):
    """Endless seeded batches of a synthetic model's activations, for `lib.dictionaries.fit`.

    The generator draws from torch's global random numbers; the stream keeps its own state and
    leaves the global one as it was. On the CPU only.
    """

    def __init__(self, model: "SyntheticModel", *, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"need batch_size >= 1, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self._random = torch.Generator().manual_seed(seed).get_state()

    @torch.no_grad()
    def __next__(self) -> Float[Tensor, "batch d_in"]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            coefficients = self.model.activation_generator.sample(self.batch_size)
            self._random = torch.get_rng_state()
        return self.model.feature_dict(coefficients)

    def state_dict(self) -> dict[str, Tensor]:
        """What the next batches depend on."""
        return {"random": self._random.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._random = state["random"].clone()


@dataclass(frozen=True, kw_only=True)
class RecoveryScores:
    """A dictionary against the truth."""

    mcc: float
    """Mean |cosine| of latents and true directions, matched one to one (Hungarian). Song et al.
    2025, arXiv:2505.20254."""
    uniqueness: float
    """True directions that are some latent's nearest, as a share of the latents."""
    precision: float
    """Of a latent's firing for its nearest feature's; mean over latents."""
    recall: float
    f1: float
    l0: float
    true_l0: float
    dead: float
    """Share of latents that never fired."""
    r2: float


def recovery_scores(
    dictionary: nn.Module,
    model: "SyntheticModel",
    *,
    n_tokens: int = 100_000,
    batch_size: int = 4096,
    seed: int = 1,
) -> RecoveryScores:
    """Score a `Dictionary`, or an SAE of sae-lens, on fresh tokens of the model it was trained on.

    Raises:
        ValueError: the dictionary has another width than the model's activations.
    """
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    width, d = dictionary.W_dec.shape[1], model.cfg.hidden_dim
    if width != d:
        raise ValueError(f"need a dictionary of width {d}, got {width}")
    was_training = dictionary.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = eval_sae_on_synthetic_data(
            dictionary, model.feature_dict, model.activation_generator, n_tokens, batch_size
        )
    dictionary.train(was_training)
    return RecoveryScores(
        mcc=found.mcc,
        uniqueness=found.uniqueness,
        precision=found.classification.precision,
        recall=found.classification.recall,
        f1=found.classification.f1_score,
        l0=found.sae_l0,
        true_l0=found.true_l0,
        dead=found.dead_latents / len(dictionary.W_dec),
        r2=found.explained_variance,
    )
