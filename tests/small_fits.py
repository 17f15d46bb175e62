"""Small trainings on planted activations, for tests of what makes training fast."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from lib.activations.buffer import Buffer
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.dictionaries.losses import Reconstruction
from lib.dictionaries.trainer import DictionaryTrainer
from lib.sparse import SparseActs, ops, screen
from lib.sparse.screen import Scan
from lib.training import Feed
from tests import fit_worker
from tests.fit_worker import Planted

CPU = torch.device("cpu")
SPARSE = {
    "topk": recipes.topk(k=3),
    "batchtopk": recipes.batchtopk(k=3),
    "jumprelu": recipes.jumprelu(l0=0.05, threshold=0.8, bandwidth=0.3),  # few from the start
    "jumprelu dense": recipes.jumprelu(l0=0.05, threshold=0.05),
}


def planted(n_steps: int, batch_size: int = 48) -> list[torch.Tensor]:
    buffer = Buffer(Planted(), batch_size=batch_size, n_tokens=512, seed=5)
    return list(islice(buffer, n_steps))


def started(
    recipe: recipes.Recipe, first: torch.Tensor, shape: dict | None = None, **settings
) -> DictionaryTrainer:
    """A trainer, calibrated on `first`; `settings` are `FitConfig`'s."""
    config = recipe.dictionary(**{"site_dims": (16,), "d_sae": 64} | (shape or {}))
    defaults = {"n_steps": 12, "lr": 3e-3, "dead_after": 150}
    trainer = DictionaryTrainer(config, recipe, FitConfig(**defaults | settings), CPU)
    trainer.start(Feed([first], CPU))
    return trainer


def trained(recipe: recipes.Recipe, n_steps: int, **settings) -> tuple[DictionaryTrainer, list]:
    """And what each step computed."""
    batches = planted(n_steps)
    it = started(recipe, batches[0], n_steps=n_steps, **settings)
    return it, [it.step(i, batch) for i, batch in enumerate(batches)]


def learnt(
    recipe: recipes.Recipe, n_steps: int, **settings
) -> tuple[DictionaryTrainer, list, float]:
    """Trained until it has learnt, and the fvu of 960 tokens that it has not seen."""
    it, outs = trained(recipe, n_steps, **{"lr": 5e-3, "dead_after": 2000} | settings)
    fvu = fvu_of(it.finished(), torch.cat(planted(n_steps + 20)[n_steps:]))
    return it, outs, fvu


@torch.no_grad()
def fvu_of(dictionary: Dictionary, x: torch.Tensor) -> float:
    return ((x - dictionary(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


def same(a: dict, b: dict) -> None:
    """Tensors equal bit for bit, in dicts or dicts of dicts."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            same(value, b[name])
        else:
            assert torch.equal(value, b[name]), name


def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-activations of 16 tokens at a time, other matrices row by row."""
    monkeypatch.setattr(screen, "TOKENS", 16)
    for module in (screen, ops):
        monkeypatch.setattr(module, "BLOCK", (1, 1))


@contextlib.contextmanager
def screening(on: bool = True, candidates: float = 3.0) -> Iterator[list[bool]]:
    """Pre-activations of any size are screened, on any CPU, unless more than this share of them are
    candidates; or none. Gives whether each look at a screen was enough."""
    looks, find_candidates = [], Scan._candidates

    def recorded(self: Scan, *given) -> SparseActs | None:
        asked = self._screened
        found = find_candidates(self, *given)
        if asked:
            looks.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "has_amx", lambda: on)
        patch.setattr(screen, "SCREENED", -math.inf)
        patch.setattr(screen, "CANDIDATES", candidates)
        patch.setattr(Scan, "_candidates", recorded)
        yield looks


def stopped_and_resumed(folder: Path, config: FitConfig) -> None:
    """Weights and history of a run stopped at steps 3 and 9 are those of one that was not."""
    names = ("topk", "batchtopk", "jumprelu")
    plans = {n: (SPARSE[n].dictionary(site_dims=(16,), d_sae=64), SPARSE[n]) for n in names}
    plans["resample"] = fit_worker.plans()["resample"]
    go = partial(fit, plans, config=config, progress=False)
    batches = planted(config.n_steps)
    whole = go(batches, folder=folder / "whole")
    for stop in (3, 9):
        with pytest.raises(ValueError, match=f"ended at step {stop}"):
            go(batches[:stop], folder=folder / "cut", resume=True)
    cut = go(batches, folder=folder / "cut", resume=True)
    for name in plans:
        assert cut[name].history == whole[name].history
        same(cut[name].dictionary.state_dict(), whole[name].dictionary.state_dict())


@dataclass(frozen=True)
class Seen:
    """One step's terms."""

    loss: float
    sparse: bool
    """Whether latents were pairs."""
    n_dead: int
    dtypes: set[torch.dtype]


@dataclass(frozen=True, kw_only=True)
class Watched(Reconstruction):
    """The sum of a recipe's terms; keeps what it was at each step, and how."""

    terms: tuple
    seen: list[Seen] = field(default_factory=list)

    def __call__(self, out):
        terms = [term(out) for term in self.terms]
        loss, sparse = torch.stack(terms).sum(), isinstance(out.acts, SparseActs)
        self.seen.append(Seen(loss.item(), sparse, len(out.dead), {term.dtype for term in terms}))
        return loss


def watched(recipe: recipes.Recipe) -> tuple[recipes.Recipe, list[Seen]]:
    term = Watched(terms=recipe.terms)
    return replace(recipe, terms=(term,)), term.seen
