"""A small fit that tests kill and resume; a module, so that a fork server can preload it."""

from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # the first optimiser would import it, for a second and more

from lib.activations.buffer import Buffer
from lib.activations.source import Block
from lib.dictionaries import FitConfig, fit, recipes

N_STEPS = 60
OFTEN = recipes.Resample(shares=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))


class Planted:
    """A source of sparse mixtures of 24 fixed directions in 16 dimensions; block i is seeded."""

    site_dims = (16,)
    hook_names = ("blocks.0.hook_resid_post",)
    n_blocks = 12
    fingerprint = "planted"

    def block(self, i: int) -> Block:
        generator = torch.Generator().manual_seed(99)
        directions = torch.randn(24, 16, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        generator.manual_seed(i)
        codes = torch.rand(200, 24, generator=generator) * (
            torch.rand(200, 24, generator=generator) < 0.1
        )
        places = torch.arange(200)
        return Block(codes @ directions + 0.5, places, places, places)


def plans() -> dict:
    """One recipe of each kind of state: thresholds, resampling with its RNG, two rules' extras."""
    chosen = {
        "batchtopk": recipes.batchtopk(k=3),
        "resample": replace(recipes.standard_resample(l1=3.0), resample=OFTEN, lr=0.05),
        "gated": recipes.gated(l1=0.3),
        "jumprelu": recipes.jumprelu(l0=0.05),
    }
    return {name: (r.dictionary(site_dims=(16,), d_sae=32), r) for name, r in chosen.items()}


def config(**changes) -> FitConfig:
    defaults = {"n_steps": N_STEPS, "lr": 3e-3, "dead_after": 150, "checkpoint_every": 4}
    return FitConfig(**defaults | {"log_every": 10} | changes)


def stream() -> Buffer:
    return Buffer(Planted(), batch_size=64, n_tokens=512, seed=5)


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    fit(plans(), stream(), config(), folder=folder, resume=True, progress=False)
