"""What makes training fast changes nothing: selection, sparse pairs, reused memory, narrow types.

On the tiny world the fast path is held against a loop of dense matrices and autograd alone.
"""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from lib import paths
from lib.activations.buffer import Buffer
from lib.activations.harvest import HarvestConfig, Harvester
from lib.activations.normalize import Normalizer
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, FitConfig, dictionary, fit, recipes, train
from lib.dictionaries.kernels import SparseActs
from lib.dictionaries.losses import Reconstruction
from lib.dictionaries.memory import Memory
from lib.dictionaries.selection import largest, largest_of_rows, places_above, true_places
from lib.dictionaries.trainee import Trainee
from lib.models.load import load_model
from tests import fit_worker
from tests.fit_worker import Planted

CPU = torch.device("cpu")
BNB = importlib.util.find_spec("bitsandbytes")
needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="gradients lie in memory only with MKL's product"
)


# ---- selection


def drawn(n: int, m: int, kind: str) -> torch.Tensor:
    matrix = torch.randn(n, m, generator=torch.Generator().manual_seed(n * m))
    if kind == "ties":
        return (2 * matrix).round()
    if kind == "-inf":
        return matrix.where(matrix > 0.5, -torch.inf)
    if kind == "negative":
        return -matrix.abs() - 1
    if kind == "transposed":
        return matrix.T.contiguous().T
    if kind == "every other":
        return torch.stack([matrix, matrix + 9], dim=2).flatten(1)[:, ::2]
    return matrix


KINDS = ("plain", "ties", "-inf", "negative", "transposed", "every other")
SIZES = [
    (3, 97, 5), (3, 97, 97), (1, 1, 1), (5, 64, 1), (5, 64, 64), (4, 4096, 32), (0, 64, 3),
    (2, 24576, 32), (2, 3072, 8), (7, 1000, 33), (6, 2**15, 1), (6, 120, 119), (3, 6144, 400),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_of_rows_are_topks(kind, dtype):
    for n, m, k in SIZES:
        matrix = drawn(n, m, kind).to(dtype)
        found = largest_of_rows(matrix, k)
        assert found.shape == (n, k)
        once = found.sort(dim=1).values.diff(dim=1) > 0
        assert once.all(), (n, m, k)
        values = matrix.gather(1, found).sort(dim=1, descending=True).values
        assert torch.equal(values, matrix.topk(k, dim=1).values), (n, m, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [-4.0, 0.0, 1.0, 2.8, 99.0, torch.inf, -torch.inf])
def test_places_above_are_those_of_a_comparison(kind, dtype, at):
    """Many, few and no hits; a bound for all columns, and one for each."""
    for n, m in ((9, 64), (9, 97), (9, 100), (50, 1024), (0, 64), (1, 8), (3, 1)):
        matrix = drawn(n, m, kind).to(dtype)
        spread = at + torch.linspace(-1, 1, m)
        lone = torch.full((m,), torch.inf)
        lone[m // 2] = at
        for bound in (torch.tensor(at), spread, lone):
            expected = (matrix > bound).flatten().nonzero()[:, 0]  # which ascend
            assert torch.equal(places_above(matrix, bound), expected), (n, m)


def test_true_places_are_where_a_mask_is_true():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((9, 64), (9, 97), (1, 8), (1, 7), (0, 8), (4, 0), (64, 200)):
        for share in (0.0, 0.003, 0.1, 0.5, 1.0):
            mask = torch.rand(n, m, generator=generator) < share
            for given in (mask, mask.T, mask[1:], mask[:, 1:]):
                expected = given.flatten().nonzero()[:, 0]
                assert torch.equal(true_places(given), expected), (n, m, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_are_topks(dtype):
    for kind in ("plain", "ties", "-inf", "negative", "transposed"):
        for m, count in ((1, 1), (97, 97), (97, 1), (4096, 1000), (1000, 999)):
            values = drawn(m, 3, kind)[:, 0].to(dtype)
            found = largest(values, count)
            assert len(found) == count and (found.diff() > 0).all()
            assert torch.equal(values[found].sort().values, values.topk(count).values.sort().values)


def test_a_column_that_nothing_exceeds_hides_no_other():
    """A decoder row of zeros has code norm 0; latents beside it are still found."""
    recipe = recipes.batchtopk(k=2)
    shape = {"site_dims": (32, 32), "d_sae": 64, "code_norm": "crosscoder"}
    dictionary = Dictionary(recipe.dictionary(**shape, unit_norm_decoder=False))
    with torch.no_grad():
        dictionary.W_dec[3] = 0
        dictionary.encoder.copy_(torch.eye(64))
    x = torch.zeros(5, 64)
    x[:, (3, 11)], x[:, 40] = 5.0, 1.0  # 3 and 11 are far enough apart to be looked at together
    for _ in range(2):  # without a hint of the threshold, and with one
        active, *_ = dictionary.training_acts(x)
        assert active.indices.tolist() == 5 * [11, 40]


# ---- no accuracy is paid


N_STEPS, BATCH, D_SAE, K = 2000, 64, 384, 8
FIT = FitConfig(n_steps=N_STEPS, lr=1e-3, dead_after=8 * BATCH, log_every=N_STEPS)


@pytest.fixture(scope="module")
def world_acts() -> tuple[torch.Tensor, torch.Tensor]:
    """A layer of a shipped model on the tiny world: to train on, and held out."""
    model, tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-llama", device="cpu")
    found = []
    for split, n_tokens in (("train", 40_000), ("test", 6_000)):
        corpus = load_corpus("world", tokenizer, n_tokens=n_tokens, seq_len=64, split=split)
        config = HarvestConfig(hook_names=("blocks.1.hook_resid_post",), batch_rows=64)
        source = Harvester([model], corpus, config)
        found.append(torch.cat([source.block(i).acts for i in range(source.n_blocks)]))
    return found[0], found[1]


def shuffled(acts: torch.Tensor):
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(acts), generator=generator)
        yield from (acts[part] for part in order.split(BATCH)[:-1])


@dataclass(frozen=True, kw_only=True)
class Watched(Reconstruction):
    """The sum of a recipe's terms; keeps what it was at each step, and how."""

    terms: tuple
    seen: list = field(default_factory=list)
    """`(loss, was it sparse, number of dead latents)` of each step."""

    def __call__(self, p):
        loss = torch.stack([term(p) for term in self.terms]).sum()
        self.seen.append((loss.item(), isinstance(p.acts, SparseActs), len(p.dead)))
        return loss


def watched(recipe: recipes.Recipe) -> tuple[recipes.Recipe, list]:
    term = Watched(terms=recipe.terms)
    return replace(recipe, terms=(term,)), term.seen


class Dense:
    """The same training, step by step as it is written: whole matrices, autograd, plain Adam."""

    def __init__(self, recipe: recipes.Recipe, first: torch.Tensor) -> None:
        self.rule, self.l0_term = recipe.rule, recipe.terms[1]
        config = recipe.dictionary(site_dims=(first.shape[1],), d_sae=D_SAE)
        torch.manual_seed(FIT.seed)
        self.dictionary = Dictionary(config)
        self.normalizer = Normalizer.fit("mean_norm", first, config.site_dims)
        with torch.no_grad():
            self.dictionary.b_dec.copy_(self.normalizer(first).mean(0))
        self.adam = torch.optim.Adam(self.dictionary.parameters(), lr=FIT.lr, foreach=False)
        self.tokens_since_fired = torch.zeros(D_SAE, dtype=torch.long)

    def acts(self, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(self.rule, recipes.TopK):
            values, places = pre.relu().topk(K, dim=1)
            return torch.zeros_like(pre).scatter(1, places, values), None
        if isinstance(self.rule, recipes.BatchTopK):
            values, places = pre.relu().flatten().topk(K * len(pre))
            threshold = self.dictionary.threshold
            smallest = values.detach().min()
            threshold.copy_(smallest if threshold == 0 else 0.9 * threshold + 0.1 * smallest)
            return torch.zeros_like(pre).flatten().scatter(0, places, values).view_as(pre), None
        theta, width = self.dictionary.log_threshold.exp(), self.rule.bandwidth
        on, near = (pre > theta).float(), ((pre - theta).abs() < width / 2).float()
        jump = near / width * (theta.detach() - theta)  # zero, with the rectangle's gradient
        return pre * on + theta.detach() * jump, (on + jump).sum(1)

    def auxk(self, x: torch.Tensor, error: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        d = self.dictionary
        pre = (x - d.b_dec.detach()) @ d.encoder[dead].T + d.b_enc[dead]
        values, places = pre.topk(min(d.d_in // 2, len(dead)), dim=1)
        codes = torch.zeros_like(pre).scatter(1, places, values.relu())
        left = (error - codes @ d.W_dec[dead]).square().sum()
        variance = (error - error.mean(0)).square().sum()
        return (x - x.mean(0)).square().sum(1).mean() / 32 * left / variance

    def step(self, step: int, batch: torch.Tensor) -> float:
        d, x = self.dictionary, self.normalizer(batch)
        acts, l0 = self.acts((x - d.b_dec) @ d.encoder.T + d.b_enc)
        error = x - (acts @ d.W_dec + d.b_dec)
        loss = error.square().sum(1).mean()
        dead = (self.tokens_since_fired >= FIT.dead_after).nonzero()[:, 0]
        if l0 is not None:
            weight = self.l0_term.weight * min(1.0, step / FIT.n_steps / self.l0_term.ramp)
            loss = loss + weight * (l0.mean() / K - 1).square()
        elif len(dead):
            loss = loss + self.auxk(x, error.detach(), dead)
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad, W_dec = d.W_dec.grad, d.W_dec
            grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec
        clip_grad_norm_(d.parameters(), FIT.grad_clip)
        self.adam.param_groups[0]["lr"] = FIT.lr * FIT.lr_factor(step)
        self.adam.step()
        with torch.no_grad():
            d.W_dec /= d.W_dec.norm(dim=1, keepdim=True)
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[(acts.detach() > 0).any(0)] = 0
        return loss.item()


@torch.no_grad()
def fvu_of(dictionary: Dictionary, x: torch.Tensor) -> float:
    return ((x - dictionary(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu_target"])
def test_fast_path_is_as_accurate_as_dense_arithmetic(name, world_acts):
    """The loss of the first 20 steps, and what 2,000 steps leave unexplained."""
    acts, held_out = world_acts
    recipe = recipes.NAMED[name](k=K)
    followed, seen = watched(recipe)
    plan = (recipe.dictionary(site_dims=(acts.shape[1],), d_sae=D_SAE), followed)
    fast = fit({"it": plan}, shuffled(acts), FIT, progress=False)["it"].dictionary

    batches = list(islice(shuffled(acts), N_STEPS))
    dense = Dense(recipe, batches[0])
    losses = [dense.step(i, batch) for i, batch in enumerate(batches)]
    assert [loss for loss, _, _ in seen[:20]] == pytest.approx(losses[:20], rel=1e-5)
    scale = dense.normalizer
    plain = dense.dictionary.folded(scale.mean, scale.scale).eval()
    found, expected = fvu_of(fast, held_out), fvu_of(plain, held_out)
    assert found == pytest.approx(expected, rel=0.01)
    assert 0.01 < found < 0.4  # and both have learnt
    sparse = [was_sparse for _, was_sparse, _ in seen]
    if name == "jumprelu_target":  # whole at first, at pairs once few are active
        assert not any(sparse[:20]) and all(sparse[N_STEPS // 2 :])
    else:
        assert all(sparse)
        assert any(n_dead for _, _, n_dead in seen[:20])  # AuxK is among the losses compared


# ---- memory that is used again


def planted(n_steps: int, batch_size: int = 48) -> list[torch.Tensor]:
    buffer = Buffer(Planted(), batch_size=batch_size, n_tokens=512, seed=5)
    return list(islice(buffer, n_steps))


SPARSE = {
    "topk": recipes.topk(k=3),
    "batchtopk": recipes.batchtopk(k=3),
    "jumprelu": recipes.jumprelu(l0=0.05, threshold=0.8, bandwidth=0.3),  # few from the start
    "jumprelu whole": recipes.jumprelu(l0=0.05, threshold=0.05),
}


def trainee(recipe: recipes.Recipe, memory: Memory | None = None, d_sae=64, **settings) -> Trainee:
    plan = (recipe.dictionary(site_dims=(16,), d_sae=d_sae), recipe)
    defaults = {"n_steps": 12, "lr": 3e-3, "dead_after": 150}
    return Trainee(*plan, FitConfig(**defaults | settings), CPU, memory)


def trained(recipe: recipes.Recipe, n_steps: int, **settings) -> tuple[Trainee, list]:
    it = trainee(recipe, n_steps=n_steps, **settings)
    batches = planted(n_steps)
    it.start(batches[0])
    return it, [it.step(i, batch) for i, batch in enumerate(batches)]


def learnt(recipe: recipes.Recipe, n_steps: int, **settings) -> tuple[Trainee, list, float]:
    """Trained until it has learnt, and the fvu of 960 tokens that it has not seen."""
    it, outs = trained(recipe, n_steps, lr=5e-3, dead_after=2000, **settings)
    fvu = fvu_of(it.finished(), torch.cat(planted(n_steps + 20)[n_steps:]))
    return it, outs, fvu


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a.keys() - {"seconds"}:
        assert torch.equal(a[name], b[name]), name


class Recorded(Memory):
    """Holds all that it handed out, so that no allocator can give the same place twice."""

    def __init__(self) -> None:
        super().__init__()
        self.out: list[torch.Tensor] = []

    def take(self, *what) -> torch.Tensor:
        self.out.append(super().take(*what))
        return self.out[-1]


class Poisoned(Recorded):
    """Fills with NaN what it hands out and what it takes back."""

    def take(self, *what) -> torch.Tensor:
        return super().take(*what).fill_(torch.nan)

    def give(self, matrix: torch.Tensor | None) -> None:
        super().give(matrix)
        if matrix is not None:
            matrix.detach().fill_(torch.nan)


def test_trainees_that_share_memory_train_as_each_alone():
    """Nothing that is read again lies in what was given back, and nothing left there is read."""
    shared, batches = Poisoned(), planted(12)
    together = {name: trainee(recipe, shared) for name, recipe in SPARSE.items()}
    for i, batch in enumerate(batches):
        for it in together.values():
            if i == 0:
                it.start(batch)
            assert math.isfinite(it.metrics(it.step(i, batch))["fvu"])
    for name, recipe in SPARSE.items():
        alone, outs = trained(recipe, 12)
        assert isinstance(outs[0].acts, SparseActs) == ("whole" not in name)
        same(together[name].state(), alone.state())


@needs_mkl
@pytest.mark.parametrize("n_trainees", [1, 2])
def test_gradients_lie_where_those_of_the_step_before_lay(n_trainees):
    """Storages are held here, so that no allocator can give the same place twice."""
    memory, held = Memory(), []
    both = [trainee(SPARSE["topk"], memory, dead_after=10**6) for _ in range(n_trainees)]
    for it in both:
        for parameter in (it.dictionary.W_dec, it.dictionary.encoder):
            parameter.register_post_accumulate_grad_hook(lambda p: held.append(p.grad.detach()[:]))
    for i, batch in enumerate(planted(6)):
        for it in both:
            if i == 0:
                it.start(batch)
            it.step(i, batch)
            assert all(p.grad is None for p in it.dictionary.parameters())
    assert len(held) == 12 * n_trainees
    assert len({tensor.data_ptr() for tensor in held}) == 2


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_pre_activations_are_overwritten_block_by_block(name, monkeypatch):
    """Never more than one block of them, in one place, and with the same pairs."""
    it, whole = trainee(SPARSE[name], Recorded()), trainee(SPARSE[name], d_sae=64)
    batches = planted(6, batch_size=50)
    it.start(batches[0]), whole.start(batches[0])
    expected = [whole.step(i, batch) for i, batch in enumerate(batches)]
    monkeypatch.setattr(dictionary, "TOKENS", 16)
    monkeypatch.setattr(dictionary, "BLOCK", (1, 1))
    for i, batch in enumerate(batches):
        out = it.step(i, batch)
        assert out.pre_acts is None
        assert torch.equal(out.acts.offsets, expected[i].acts.offsets)
        torch.testing.assert_close(out.acts.dense(), expected[i].acts.dense(), rtol=1e-4, atol=1e-5)
    blocks = [matrix for matrix in it.memory.out if matrix.shape[1] == 64]
    assert len(blocks) >= 6 and {len(matrix) for matrix in blocks} == {16}
    assert len({matrix.data_ptr() for matrix in blocks}) == 1


@pytest.mark.parametrize("n", [1, 16, 50])
def test_pairs_of_blocks_are_those_of_the_whole(n, monkeypatch):
    monkeypatch.setattr(dictionary, "TOKENS", 16)
    monkeypatch.setattr(dictionary, "BLOCK", (1, 1))
    d, x = Dictionary(SPARSE["topk"].dictionary(site_dims=(16,), d_sae=64)), torch.randn(n, 16)
    found = d.pairs(x, lambda pre: SparseActs.of(pre.where(pre > 0.5, 0)))
    pre = d.pre_acts(x).detach()
    torch.testing.assert_close(found.dense(), pre.where(pre > 0.5, 0))
    assert found.n == n and 0 < len(found.values) < 40 * n


def test_memory_keeps_two_of_a_shape_and_a_type():
    memory, what = Memory(), (3, 4, torch.float32, CPU)
    given = [memory.take(*what) for _ in range(3)]
    for matrix in (*given, torch.zeros(3), None):
        memory.give(matrix)
    assert memory.take(4, 3, torch.float32, CPU).data_ptr() not in {m.data_ptr() for m in given}
    assert memory.take(3, 4, torch.bfloat16, CPU).dtype == torch.bfloat16
    taken = [memory.take(*what).data_ptr() for _ in range(3)]
    assert set(taken[:2]) == {given[0].data_ptr(), given[1].data_ptr()}
    assert taken[2] not in {m.data_ptr() for m in given}


@needs_mkl
@pytest.mark.parametrize("normalize", ["none", "mean_norm"])
def test_a_dictionary_shares_nothing_with_memory(normalize, monkeypatch):
    made = []
    monkeypatch.setattr(train, "Memory", lambda: made.append(Poisoned()) or made[-1])
    recipe = SPARSE["batchtopk"]
    plan = (recipe.dictionary(site_dims=(16,), d_sae=64), recipe)
    config = FitConfig(n_steps=6, dead_after=150, normalize=normalize)
    found = fit({"it": plan}, planted(6), config, progress=False)["it"].dictionary
    (memory,) = made
    before = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    places = {matrix.untyped_storage().data_ptr() for matrix in memory.out}
    assert len(memory.out) >= 3 * 6
    for tensor in (*found.parameters(), *found.buffers()):
        assert tensor.grad is None and tensor.untyped_storage().data_ptr() not in places
    for matrix in memory.out:
        matrix.detach().fill_(7.0)
    same(before, found.state_dict())


def test_a_failed_step_leaves_no_gradient():
    """Whoever goes on after it trains as if it had never been."""
    it, other = trainee(SPARSE["topk"]), trainee(SPARSE["topk"])
    batches = planted(2)
    for one in (it, other):
        one.start(batches[0])
    with pytest.raises(FloatingPointError, match="gradient's norm"):
        it.step(0, batches[0] * 1e17)
    for one in (it, other):
        one.step(0, batches[1])
    same(it.state(), other.state())


# ---- narrow types


@pytest.mark.parametrize("name", SPARSE)
def test_bfloat16_products_train_as_well(name):
    fvus = {}
    for dtype in ("float32", "bfloat16"):
        it, outs, fvus[dtype] = learnt(SPARSE[name], 120, dtype=dtype)
        pre = outs[-1].pre_acts
        assert (pre is None) == ("whole" not in name)
        assert pre is None or pre.dtype == getattr(torch, dtype)
        for key, tensor in it.state().items():
            wide = key.startswith(("weights.", "optimizer.", "normalizer."))
            assert not wide or tensor.dtype == torch.float32, key
        assert fvus[dtype] < 0.6 * it.metrics(outs[0])["fvu"]
    assert fvus["bfloat16"] == pytest.approx(fvus["float32"], rel=0.1)
    assert fvus["bfloat16"] != fvus["float32"]


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


OFTEN = {"n_steps": 20, "lr": 3e-3, "dead_after": 150, "checkpoint_every": 2, "log_every": 5}


def test_bfloat16_resumes_bit_for_bit(tmp_path):
    stopped_and_resumed(tmp_path, FitConfig(**OFTEN, dtype="bfloat16"))


# ---- 8-bit moments


needs_bnb = pytest.mark.skipif(BNB is None, reason="needs bitsandbytes, of the extra gpu")


@needs_bnb
@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_8bit_moments_train_as_well(name):
    fvus = {}
    for moments in ("float32", "8bit"):
        it, outs, fvus[moments] = learnt(SPARSE[name], 120, moments=moments, d_sae=256)
        assert fvus[moments] < 0.6 * it.metrics(outs[0])["fvu"]
    assert fvus["8bit"] == pytest.approx(fvus["float32"], rel=0.05)
    state = it.state()
    for parameter in ("W_dec", "encoder"):
        assert state[f"optimizer.{parameter}.state1"].dtype == torch.uint8, parameter
        assert state[f"optimizer.{parameter}.state2"].dtype == torch.uint8, parameter
        assert state[f"weights.{parameter}"].dtype == torch.float32
    assert state["optimizer.b_dec.state1"].dtype == torch.float32


@needs_bnb
def test_8bit_moments_go_on_from_their_state():
    batches = planted(10)
    it, other = (trainee(SPARSE["topk"], moments="8bit", d_sae=256, seed=i) for i in (0, 1))
    it.start(batches[0])
    for i in range(5):
        it.step(i, batches[i])
    other.load_state({name: tensor.clone() for name, tensor in it.state().items()})
    for i in range(5, 10):
        for one in (it, other):
            one.step(i, batches[i])
        same(it.state(), other.state())


@needs_bnb
def test_8bit_moments_resume_bit_for_bit(tmp_path):
    stopped_and_resumed(tmp_path, FitConfig(**OFTEN, moments="8bit"))


@needs_bnb
@pytest.mark.parametrize("d_sae", [64, 512])
def test_8bit_moments_of_revived_rows_are_forgotten(d_sae):
    """In float32 (small parameters), and in codes of 8 bits."""
    batches, rows = planted(10), torch.arange(10)
    it = trainee(recipes.standard_resample(l1=0.3), moments="8bit", d_sae=d_sae, n_steps=10)
    it.start(batches[0])
    it.step(0, batches[0])
    with torch.no_grad():
        it.dictionary.b_enc[rows] = -100
    it.tokens_since_fired[rows] = 150
    before = moments(it)
    it.step(1, batches[1])
    assert (it.dictionary.b_enc[rows] == 0).all()
    after = moments(it)
    for name in ("W_dec", "encoder", "b_enc"):
        for moment in (0, 1):
            assert (before[name][moment][rows] != 0).any(), name
            assert (after[name][moment][rows] == 0).all(), name
            assert (after[name][moment][10:] != 0).any(), name


def moments(it: Trainee) -> dict[str, list[torch.Tensor]]:
    """What bitsandbytes' moments stand for, up to the scale of each block."""
    found = {}
    for name, parameter in it.dictionary.named_parameters():
        state = it.optimizer.adam.state[parameter]
        pairs = [(state[f"state{i}"], state.get(f"qmap{i}")) for i in (1, 2)]
        found[name] = [s.clone() if table is None else table[s.long()] for s, table in pairs]
    return found


def test_bad_types_are_refused(monkeypatch):
    for bad in ({"dtype": "float16"}, {"dtype": "fp32"}, {"moments": "4bit"}, {"moments": "8"}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"need {name} float32 or .*, got {value!r}"):
            FitConfig(n_steps=1, **bad)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes: pip install '\.\[gpu\]'"):
        FitConfig(n_steps=1, moments="8bit")
    FitConfig(n_steps=1, dtype="bfloat16")  # needs nothing


# ---- clipping inside the optimiser's pass


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("grad_clip", [0.01, 1e6])
def test_clipping_is_that_of_clip_grad_norm(name, grad_clip, monkeypatch):
    it = trainee(SPARSE[name], grad_clip=grad_clip)
    batches = [scale * x for scale, x in zip((3.0, 1.0, 30.0, 0.1), planted(4), strict=True)]
    it.start(batches[0])
    plain = Dictionary(it.dictionary.config)
    plain.load_state_dict(it.dictionary.state_dict())
    adam = torch.optim.Adam(plain.parameters(), lr=1.0, foreach=False)
    real, norms = it.optimizer.step, []

    def follow(lr: float, divisor: torch.Tensor) -> None:
        """The gradients of this step, to the other optimiser first."""
        for ours, theirs in zip(it.dictionary.parameters(), plain.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        norms.append(clip_grad_norm_(plain.parameters(), grad_clip).item())
        adam.param_groups[0]["lr"] = lr
        adam.step()
        real(lr, divisor)

    monkeypatch.setattr(it.optimizer, "step", follow)
    for i, batch in enumerate(batches):
        it.step(i, batch)
        plain.normalize_decoder_()
        for key, tensor in plain.state_dict().items():
            if key != "threshold":
                ours = it.dictionary.state_dict()[key]
                torch.testing.assert_close(ours, tensor, rtol=1e-6, atol=1e-6, msg=f"{key} {i}")
    assert max(norms) > 10 * min(norms) and min(norms) > 0.01 and max(norms) < 1e6
    assert max(norms) > 1


# ---- peak memory


PEAK = """
import ctypes, sys
from pathlib import Path
import torch
from lib.dictionaries import FitConfig, recipes
from lib.dictionaries.trainee import Trainee

torch.set_num_threads(1)

def kb(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

def trained(d, d_sae, n):
    recipe, x = recipes.topk(k=8), torch.randn(3, n, d)
    plan = (recipe.dictionary(site_dims=(d,), d_sae=d_sae), recipe)
    it = Trainee(*plan, FitConfig(n_steps=3), torch.device("cpu"))
    it.start(x[0])
    for i, batch in enumerate(x):
        it.step(i, batch)

trained(16, 128, 64)  # what is imported and started once
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = kb("VmRSS")
trained(*map(int, sys.argv[1:]))
print((kb("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_step_is_as_stated():
    """Weights, gradients and two moments, and a block of pre-activations; no `[n d_sae]`."""
    d, d_sae, n = 64, 8192, 2048
    environment = os.environ | {"PYTHONPATH": str(paths.root())}
    command = [sys.executable, "-c", PEAK, str(d), str(d_sae), str(n)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_parameters = 2 * d * d_sae + d_sae + d
    stated = 16 * n_parameters + 4 * dictionary.TOKENS * d_sae
    # it takes 10 MB more; one matrix has 67
    assert int(done.stdout) <= stated + 24e6
