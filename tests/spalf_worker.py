"""A small run of SPALF that tests kill and resume; a fork server can preload it."""

from pathlib import Path

import torch
import torch._dynamo  # the first optimiser would import it, for a second and more
from torch.nn.functional import normalize

from lib.activations.buffer import Buffer
from lib.spalf import Anchors, SpalfConfig, SpalfFit, train_spalf
from tests.fit_worker import Planted

D_IN, N_STEPS = 16, 60


def config(**changes) -> SpalfConfig:
    defaults = {"n_steps": N_STEPS, "d_sae": 48, "l0_target": 4.0, "r2_target": 0.6, "lr": 2e-5}
    return SpalfConfig(**defaults | {"log_every": 5, "checkpoint_every": 4} | changes)


def anchors(n: int = 4) -> Anchors:
    """The first directions of `Planted`."""
    directions = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(99))
    return Anchors(torch.arange(n) + 100, 3 * normalize(directions, dim=1)[:n])


def stream(batch_size: int = 128) -> Buffer:
    return Buffer(Planted(), batch_size=batch_size, n_tokens=2048, seed=5)


def patched_kl(rebuild, step: int) -> torch.Tensor:
    """In place of a model's KL: a squared error on tokens that depend on the step."""
    x = Planted().block(500 + step % 3).acts
    return 0.1 * (rebuild(x) - x).square().sum(1).mean()


def train(source=None, settings: SpalfConfig | None = None, **options) -> SpalfFit:
    given = {"anchors": anchors(), "patched_kl": patched_kl, "progress": False} | options
    return train_spalf(
        config() if settings is None else settings,
        stream() if source is None else source,
        d_in=D_IN,
        **given,
    )


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    train(folder=folder, resume=True)
