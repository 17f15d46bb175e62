"""Planted features: sae-lens's `SyntheticModel` as a stream, and its scores of a dictionary."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class SyntheticStream(Iterator[Tensor]):
    """Endless batches of a model's activations; torch's own random state stays as it was."""

    def __init__(self, model, *, batch_size: int, seed: int = 0) -> None:
        self.model, self.batch_size = model, batch_size
        self.random = torch.Generator().manual_seed(seed).get_state()

    @torch.no_grad()
    def __next__(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            coefficients = self.model.activation_generator.sample(self.batch_size)
            self.random = torch.get_rng_state()
        return self.model.feature_dict(coefficients)


@dataclass(frozen=True, kw_only=True)
class RecoveryScores:
    """A dictionary against the truth."""

    mcc: float
    """Mean |cosine| of latents and true directions, matched one to one. arXiv:2505.20254."""
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
    model,
    *,
    n_tokens: int = 100_000,
    batch_size: int = 4096,
    seed: int = 1,
) -> RecoveryScores:
    """Score a `Dictionary`, or an SAE of sae-lens, on fresh tokens of the model it learned."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = eval_sae_on_synthetic_data(
            dictionary, model.feature_dict, model.activation_generator, n_tokens, batch_size
        )
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
