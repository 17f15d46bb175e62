"""Memory that is used again: who shares it trains as if alone, and a step takes what is stated."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import paths
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.dictionaries import fit as train
from lib.dictionaries import rules as sparsity
from lib.sparse import SparseActs
from lib.sparse import screen as search
from lib.sparse.memory import Memory
from lib.sparse.screen import Search
from lib.sparse.select import true_places
from tests.small_fits import (
    CPU,
    SPARSE,
    Recorded,
    in_small_blocks,
    planted,
    same,
    screening,
    trained,
    trainee,
)

needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="gradients lie in memory only with MKL's product"
)


class Poisoned(Recorded):
    """Fills with NaN what it hands out and what it takes back."""

    def take(self, *what, **named) -> torch.Tensor:
        return super().take(*what, **named).fill_(torch.nan)

    def give(self, matrix: torch.Tensor | None) -> None:
        super().give(matrix)
        if matrix is not None:
            matrix.detach().fill_(torch.nan)


@pytest.mark.parametrize("screened", [True, False])
def test_trainees_that_share_memory_train_as_each_alone(screened):
    """Nothing that is read again lies in what was given back, and nothing left there is read."""
    shared, batches = Poisoned(), planted(12)
    together = {name: trainee(recipe, shared) for name, recipe in SPARSE.items()}
    with screening(screened) as scans:
        for i, batch in enumerate(batches):
            for it in together.values():
                if i == 0:
                    it.start(batch)
                assert math.isfinite(it.metrics(it.step(i, batch))["fvu"])
        for name, recipe in SPARSE.items():
            alone, outs = trained(recipe, 12)
            assert isinstance(outs[0].acts, SparseActs) == ("whole" not in name)
            same(together[name].state(), alone.state())
    assert any(scans) == screened


@needs_mkl
def test_gradients_of_the_dead_are_added_in_place():
    """What AuxK adds to a lent matrix leaves it where it was, so that it is given back."""
    memory = Memory()
    it, batches = trainee(SPARSE["topk"], memory, dead_after=1), planted(6)
    it.start(batches[0])
    n_dead = [len(it.step(i, batch).dead) for i, batch in enumerate(batches)]
    assert min(n_dead[1:]) > 0 and not memory._lent


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
    in_small_blocks(monkeypatch)
    monkeypatch.setattr(sparsity, "DENSE", 1.0)  # few tokens may have many
    for i, batch in enumerate(batches):
        out = it.step(i, batch)
        assert out.pre_acts is None
        assert torch.equal(out.acts.offsets, expected[i].acts.offsets)
        torch.testing.assert_close(out.acts.dense(), expected[i].acts.dense(), rtol=1e-4, atol=1e-5)
    blocks = [matrix for matrix in it.memory.out if matrix.shape[1] == 64]
    assert len(blocks) >= 6 and {len(matrix) for matrix in blocks} == {16}
    assert len({matrix.data_ptr() for matrix in blocks}) == 1


def test_screens_lie_where_those_of_the_step_before_lay():
    memory, batches = Recorded(), planted(4)
    both = [trainee(SPARSE[name], memory) for name in ("topk", "batchtopk")]
    with screening():
        for i, batch in enumerate(batches):
            for it in both:
                if i == 0:
                    it.start(batch)
                it.step(i, batch)
    screens = [matrix for matrix in memory.out if matrix.dtype == torch.bfloat16]
    assert len(screens) == 3 * 2 * 4 and len({matrix.data_ptr() for matrix in screens}) == 3


@pytest.mark.parametrize("n", [1, 16, 50])
def test_pairs_of_blocks_are_those_of_the_whole(n, monkeypatch):
    in_small_blocks(monkeypatch)
    d, x = Dictionary(SPARSE["topk"].dictionary(site_dims=(16,), d_sae=64)), torch.randn(n, 16)
    with Search(d, x) as scan:
        found = scan(lambda pre, slack: true_places(pre > 0.5), lambda active: active)
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


def test_memory_takes_back_what_it_lent_once():
    memory, what = Recorded(), (3, 4, torch.float32, CPU)
    lent, foreign = memory.take(*what), torch.zeros(3, 4)
    memory.give(foreign)
    memory.give(lent.detach())  # as a gradient: another tensor in the same place
    memory.give(lent)
    taken = [memory.take(3, 4, dtype=torch.float32, device=CPU).data_ptr() for _ in range(3)]
    assert taken[0] == lent.data_ptr() and len(set(taken)) == 3
    assert foreign.data_ptr() not in taken


@pytest.mark.parametrize("name", ["standard", "gated"])
def test_gradients_that_were_not_lent_are_not_kept(name):
    """Where products are dense, autograd makes the gradients; memory would only grow by them."""
    memory, made = Recorded(), []
    it = trainee(recipes.NAMED[name](), memory)
    for parameter in it.dictionary.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: made.append(p.grad.detach()[:]))
    batches = planted(3)
    it.start(batches[0])
    for i, batch in enumerate(batches):
        it.step(i, batch)
    assert not memory.out and len(made) >= 3 * 4
    places = {grad.data_ptr() for grad in made}  # held, so that nothing else can lie there
    for grad in [grad for grad in made if grad.ndim == 2]:
        assert memory.take(*grad.shape, grad.dtype, CPU).data_ptr() not in places


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


# ---- peak memory


PEAK = """
import ctypes, sys
from pathlib import Path
import torch
from lib.dictionaries import FitConfig, recipes
from lib.sparse import screen as search
from lib.dictionaries.trainer import DictionaryTrainer

torch.set_num_threads(1)
screened = sys.argv.pop() == "screened"
search.has_amx = lambda: screened

def kb(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

def trained(name, d, d_sae, n):
    recipe, x = recipes.NAMED[name](k=8), torch.randn(3, n, d)
    plan = (recipe.dictionary(site_dims=(d,), d_sae=d_sae), recipe)
    it = DictionaryTrainer(*plan, FitConfig(n_steps=3), torch.device("cpu"))
    it.start(x[0])
    for i, batch in enumerate(x):
        it.step(i, batch)

trained(sys.argv[1], 16, 128, 64)  # what is imported and started once
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = kb("VmRSS")
trained(sys.argv[1], *map(int, sys.argv[2:]))
print((kb("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["screened", "in float32"])
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_peak_memory_of_a_step_is_as_stated(name, how):
    """Weights, gradients and two moments, and a block of pre-activations (or of their bounds, twice
    as many in half the bytes); no `[n d_sae]`. The first step, in which BatchTopK knows no
    threshold, is among them."""
    d, d_sae, n = 64, 8192, 2048
    environment = os.environ | {"PYTHONPATH": str(paths.root())}
    command = [sys.executable, "-c", PEAK, name, str(d), str(d_sae), str(n), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_parameters = 2 * d * d_sae + d_sae + d
    stated = 16 * n_parameters + 4 * search.TOKENS * d_sae
    # it takes 10 MB more; one matrix has 67
    assert int(done.stdout) <= stated + 24e6
