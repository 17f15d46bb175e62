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
from lib.sparse import SparseActs, memory
from lib.sparse import screen as search
from lib.sparse.memory import Memory
from lib.sparse.screen import Search
from tests import fit_worker
from tests.fit_worker import Planted

CPU = torch.device("cpu")
SPARSE = {
    "topk": recipes.topk(k=3),
    "batchtopk": recipes.batchtopk(k=3),
    "jumprelu": recipes.jumprelu(l0=0.05, threshold=0.8, bandwidth=0.3),  # few from the start
    "jumprelu whole": recipes.jumprelu(l0=0.05, threshold=0.05),
}


def planted(n_steps: int, batch_size: int = 48) -> list[torch.Tensor]:
    buffer = Buffer(Planted(), batch_size=batch_size, n_tokens=512, seed=5)
    return list(islice(buffer, n_steps))


def trainee(
    recipe: recipes.Recipe,
    memory: Memory | None = None,
    d_sae: int = 64,
    shape: dict | None = None,
    **settings,
) -> DictionaryTrainer:
    """Of the planted activations, unless `shape` says otherwise; `settings` are `FitConfig`'s."""
    config = recipe.dictionary(**{"site_dims": (16,), "d_sae": d_sae} | (shape or {}))
    defaults = {"n_steps": 12, "lr": 3e-3, "dead_after": 150}
    return DictionaryTrainer(config, recipe, FitConfig(**defaults | settings), CPU, memory)


def trained(recipe: recipes.Recipe, n_steps: int, **settings) -> tuple[DictionaryTrainer, list]:
    """And what each step computed."""
    it = trainee(recipe, n_steps=n_steps, **settings)
    batches = planted(n_steps)
    it.start(batches[0])
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


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit, but for the time it took."""
    assert a.keys() == b.keys()
    for name in a.keys() - {"seconds"}:
        assert torch.equal(a[name], b[name]), name


def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-activations of 16 tokens at a time, other matrices row by row."""
    for name in ("TOKENS", "SCREENED_TOKENS"):
        monkeypatch.setattr(search, name, 16)
    for module in (search, memory):
        monkeypatch.setattr(module, "BLOCK", (1, 1))


@contextlib.contextmanager
def screening(on: bool = True, candidates: float = 1.0) -> Iterator[list[bool]]:
    """Pre-activations of any size are screened, on any CPU, unless more than this share of them are
    candidates; or none. Gives whether each scan of a screen was enough."""
    scans, find_candidates = [], Search._candidates

    def recorded(self: Search, find: search.Find) -> SparseActs | None:
        found = find_candidates(self, find)
        scans.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "has_amx", lambda: on)
        patch.setattr(search, "SCREENED", -math.inf)
        patch.setattr(search, "CANDIDATES", candidates)
        patch.setattr(Search, "_candidates", recorded)
        yield scans


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


def below(numbers: torch.Tensor) -> torch.Tensor:
    """A float32 just below each."""
    down = torch.tensor(-torch.inf)
    return numbers.float().nextafter(down).nextafter(down)


def marked(places: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Where they are in it; they are checked to ascend."""
    assert (places.diff() > 0).all()
    mask = torch.zeros(matrix.numel(), dtype=torch.bool)
    mask[places] = True
    return mask.view(matrix.shape)


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

    def __call__(self, p):
        terms = [term(p) for term in self.terms]
        loss, sparse = torch.stack(terms).sum(), isinstance(p.acts, SparseActs)
        self.seen.append(Seen(loss.item(), sparse, len(p.dead), {term.dtype for term in terms}))
        return loss


def watched(recipe: recipes.Recipe) -> tuple[recipes.Recipe, list[Seen]]:
    term = Watched(terms=recipe.terms)
    return replace(recipe, terms=(term,)), term.seen


class Recorded(Memory):
    """Holds all that it handed out, so that no allocator can give the same place twice."""

    def __init__(self) -> None:
        super().__init__()
        self.out: list[torch.Tensor] = []

    def take(self, *what, **named) -> torch.Tensor:
        self.out.append(super().take(*what, **named))
        return self.out[-1]
