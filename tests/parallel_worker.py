"""What each rank of a data-parallel fit does: `torchrun --nproc-per-node 2 tests/parallel_worker.py
FOLDER`. Results go to `FOLDER/<rank>.pt`; what the ranks write together, to `FOLDER/<scenario>`.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from lib.activations.buffer import Buffer
from lib.dictionaries import FitConfig, fit, recipes
from lib.training import distributed
from tests.fit_worker import OFTEN, Planted, stream
from tests.small_fits import screening

N_STEPS = 20
RECIPES = {
    "topk": recipes.topk(k=2),
    "batchtopk": recipes.batchtopk(k=2),
    "crosscoder": recipes.batchtopk(k=2),
    "dfc": recipes.batchtopk(k=2),
    "decoupled": recipes.batchtopk(k=2),
    "matryoshka": recipes.matryoshka(k=2),
    "jumprelu": recipes.jumprelu(l0=0.05),
    "jumprelu_target": recipes.jumprelu(l0=1.0, target_l0=3.0, threshold=0.5),
    "resample": replace(recipes.standard_resample(l1=3.0), resample=OFTEN, lr=0.03),
    "ghost": replace(recipes.ghost(l1=3.0), lr=0.03),
    "p_anneal": recipes.p_anneal(l1=0.3, p_end=0.6),
    "entropy": recipes.entropy(l1=0.1, weight=0.3),
    "gated": recipes.gated(l1=0.3),
    "gated_anneal": recipes.gated_anneal(l1=0.3, p_end=0.6),
}


def plans(*names: str) -> dict:
    chosen = {name: RECIPES[name] for name in names or RECIPES}
    two = {"site_dims": (10, 6)}
    shapes = {"crosscoder": two, "dfc": two | {"exclusive": (8, 8)}}
    shapes["decoupled"] = two | {"code_norm": "decoupled"}
    return {
        name: (
            recipe.dictionary(**{"d_sae": 96, "site_dims": (16,)} | shapes.get(name, {})),
            recipe,
        )
        for name, recipe in chosen.items()
    }


def config(**changes) -> FitConfig:
    defaults = {"n_steps": N_STEPS, "lr": 3e-3, "dead_after": 128, "log_every": 1}
    return FitConfig(**defaults | changes)


@contextlib.contextmanager
def recorded() -> Iterator[list[float]]:
    """Every loss that is backpropagated."""
    losses, backward = [], torch.Tensor.backward

    def record(loss, *args, **options):
        losses.append(loss.item())
        backward(loss, *args, **options)

    torch.Tensor.backward = record
    try:
        yield losses
    finally:
        torch.Tensor.backward = backward


def trained(batches, names=(), **options) -> dict:
    """Losses of every step and dictionary; weights and history of every dictionary."""
    changes = options.pop("changes", {})
    with recorded() as losses:
        fitted = fit(plans(*names), batches, config(**changes), progress=False, **options)
    weights = {name: result.dictionary.state_dict() for name, result in fitted.items()}
    history = {name: result.history for name, result in fitted.items()}
    return {"losses": losses, "weights": weights, "history": history}


def screened(batches) -> dict:
    """Of the two that find pairs in their own ways, with upper bounds of the pre-activations."""
    with screening() as scans:
        return trained(batches, ["topk", "batchtopk"]) | {"scans": set(scans)}


def failed(batches, **options) -> tuple[str, str]:
    """Type and message of what fit raises."""
    try:
        trained(batches, ["topk", "batchtopk"], changes={"dead_after": 10**6}, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


class Broken(Exception):
    """Cannot be unpickled: it needs two arguments."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"{why} at {step}")


def spoilt(on_rank: int, at_step: int, spoil) -> Iterator[torch.Tensor]:
    for step, batch in enumerate(distributed.shard(stream())):
        yield spoil(batch) if (step, distributed.rank()) == (at_step, on_rank) else batch


def with_nan(batch: torch.Tensor) -> torch.Tensor:
    batch[:2, 3] = torch.nan
    return batch


def breaks(batch: torch.Tensor) -> torch.Tensor:
    raise Broken(5, "no power")


def own_share() -> Buffer:
    return Buffer(distributed.Share(Planted()), batch_size=32, n_tokens=256, seed=5)


def resumed(folder: Path) -> None:
    """The same training twice: at once, and stopped by one rank's error and resumed."""
    names, options = ["batchtopk", "resample"], {"changes": {"checkpoint_every": 3}}

    def until(n: int) -> Buffer:
        source = own_share()

        class Limited(Buffer):
            def __next__(self):
                if distributed.rank() == 1 and self.n_served >= n * 32:
                    raise Broken(n, "enough")
                return super().__next__()

        source.__class__ = Limited
        return source

    trained(own_share(), names, folder=folder / "whole", **options)
    for n in (2, 10, 17):
        with contextlib.suppress(Broken, RuntimeError):
            trained(until(n), names, folder=folder / "cut", resume=True, **options)
    trained(own_share(), names, folder=folder / "cut", resume=True, **options)


def score_sets(n_ranks: int) -> dict[str, list[torch.Tensor]]:
    """Scores of each rank, by case: all different, full of ties, too few, none on the first."""
    generator = torch.Generator().manual_seed(0)
    sizes = [40 + 30 * r for r in range(n_ranks)]
    drawn = [torch.rand(size, generator=generator) * 10.0**-r for r, size in enumerate(sizes)]
    return {
        "different": drawn,
        "ties": [(scores * 3).ceil() for scores in drawn],
        "too few": [scores[:5] for scores in drawn],
        "none": [drawn[0][:0], *drawn[1:]],
    }


def quotas(count: int) -> dict[str, int]:
    sets = score_sets(distributed.world_size())
    return {name: distributed.quota(s[distributed.rank()], count) for name, s in sets.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = distributed.rank()
    results = {
        "world": (rank, distributed.world_size()),
        "recipes": trained(distributed.shard(stream())),
        "per_dim": trained(distributed.shard(stream()), ["topk"], changes={"normalize": "per_dim"}),
        "screened": screened(distributed.shard(stream())),
        "quotas": quotas(25),
    }
    own = folder / f"of-rank-{rank}"  # what a rank writes on its own would be found there
    writing = {"changes": {"checkpoint_every": 8}, "folder": own, "tracking": "tensorboard"}
    trained(distributed.shard(stream()), ["topk"], **writing)
    results["errors"] = {
        "sizes": failed(spoilt(1, 5, lambda batch: batch[1:])),
        "uncut": failed(distributed.shard(batch[1:] for batch in stream())),
        "nan": failed(spoilt(1, 5, with_nan), folder=own),
        "loss": failed(spoilt(1, 6, lambda batch: batch * 1e30), folder=own / "loss"),
        "gradient": failed(spoilt(1, 6, lambda batch: batch * 1e17)),
        "ended": failed(islice(distributed.shard(stream()), 4 + 40 * rank)),
        "broken": failed(spoilt(1, 5, breaks)),
        "folder": failed(distributed.shard(stream()), folder=folder / "file" / "below"),
    }
    resumed(folder)
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
