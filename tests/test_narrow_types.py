"""Products in bfloat16 and moments in 8 bits train as well, and resume bit for bit."""

import copy
import importlib.util

import pytest
import torch

from lib.dictionaries import FitConfig, recipes
from lib.dictionaries.trainer import DictionaryTrainer
from tests.small_fits import SPARSE, learnt, planted, same, started, stopped_and_resumed, watched

pytestmark = pytest.mark.slow

BNB = importlib.util.find_spec("bitsandbytes")


@pytest.mark.parametrize("name", SPARSE)
def test_bfloat16_products_train_as_well(name):
    fvus = {}
    for dtype in ("float32", "bfloat16"):
        it, outs, fvus[dtype] = learnt(SPARSE[name], 120, dtype=dtype)
        pre = outs[-1].codes.pre_acts
        assert (pre is None) == ("dense" not in name)
        assert pre is None or pre.dtype == getattr(torch, dtype)
        for part in ("model", "optimizer"):
            assert {tensor.dtype for tensor in it.state()[part].values()} == {torch.float32}
        assert fvus[dtype] < 0.6 * it.metrics(outs[0])["fvu"]
    assert fvus["bfloat16"] == pytest.approx(fvus["float32"], rel=0.1)
    assert fvus["bfloat16"] != fvus["float32"]


WIDE = {
    "gated": recipes.gated(l1=0.3),
    "gated_anneal": recipes.gated_anneal(l1=0.1),
    "p_anneal": recipes.p_anneal(l1=0.1),
    "ghost": recipes.ghost(l1=1.0),
    "matryoshka": recipes.matryoshka(k=3),
    "topk": recipes.topk(k=2),
}
OF_THE_DEAD = ("ghost", "topk")


@pytest.mark.parametrize("name", WIDE)
def test_terms_on_products_in_bfloat16_train_as_well(name):
    """Terms that multiply matrices of their own, or raise activations to a power."""
    losses, fvus, l0s = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        recipe, seen = watched(WIDE[name])
        it, outs, fvus[dtype] = learnt(recipe, 120, dtype=dtype, shape={"d_sae": 96}, dead_after=96)
        losses[dtype] = [step.loss for step in seen]
        l0s[dtype] = it.metrics(outs[-1])["l0"]
        assert {kind for step in seen for kind in step.dtypes} == {torch.float32}
        assert len([step for step in seen if step.n_dead]) > 60 or name not in OF_THE_DEAD
        assert fvus[dtype] < 0.6 * it.metrics(outs[0])["fvu"]
        if not seen[0].sparse:
            assert outs[-1].pre_acts.dtype == getattr(torch, dtype)
    assert losses["bfloat16"][:10] == pytest.approx(losses["float32"][:10], rel=0.01)
    assert losses["bfloat16"] != losses["float32"]
    assert fvus["bfloat16"] == pytest.approx(fvus["float32"], rel=0.1)
    assert l0s["bfloat16"] == pytest.approx(l0s["float32"], rel=0.1)


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
        it, outs, fvus[moments] = learnt(SPARSE[name], 120, moments=moments, shape={"d_sae": 256})
        assert fvus[moments] < 0.6 * it.metrics(outs[0])["fvu"]
    assert fvus["8bit"] == pytest.approx(fvus["float32"], rel=0.05)
    state = it.state()
    for parameter in ("W_dec", "W_enc"):
        for moment in ("state1", "state2"):
            assert state["optimizer"][f"{parameter}.{moment}"].dtype == torch.uint8
        assert state["model"][parameter].dtype == torch.float32
    assert state["optimizer"]["b_dec.state1"].dtype == torch.float32


@needs_bnb
def test_8bit_moments_go_on_from_their_state():
    batches = planted(10)
    settings = {"moments": "8bit", "shape": {"d_sae": 256}}
    it, other = (started(SPARSE["topk"], batches[0], **settings, seed=i) for i in (0, 1))
    for i in range(5):
        it.step(i, batches[i])
    other.load_state(copy.deepcopy(it.state()))
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
    shape = {"d_sae": d_sae}
    recipe = recipes.standard_resample(l1=0.3)
    it = started(recipe, batches[0], shape, moments="8bit", n_steps=10)
    it.step(0, batches[0])
    with torch.no_grad():
        it.dictionary.b_enc[rows] = -100
    it.tokens_since_fired[rows] = 150
    before = moments(it)
    it.step(1, batches[1])
    assert (it.dictionary.b_enc[rows] == 0).all()
    after = moments(it)
    for name in ("W_dec", "W_enc", "b_enc"):
        for moment in (0, 1):
            assert (before[name][moment][rows] != 0).any(), name
            assert (after[name][moment][rows] == 0).all(), name
            assert (after[name][moment][10:] != 0).any(), name


def moments(it: DictionaryTrainer) -> dict[str, list[torch.Tensor]]:
    """What bitsandbytes' moments stand for, up to the scale of each block."""
    found = {}
    for name, rows in it.optimizer.parameters.items():
        state = it.optimizer.adam.state[rows]
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
