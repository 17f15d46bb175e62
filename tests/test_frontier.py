"""Dictionaries side by side: points, who is beaten, what a sweep has in between."""

import math

import pytest
import torch

from lib import paths
from lib.activations.harvest import HarvestConfig, Harvester
from lib.analysis.frontier import frontier_points, interpolated, pareto
from lib.analysis.metrics import drift_fidelity, patched_losses, reconstruction
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, DictionaryConfig, load_dictionaries
from lib.dictionaries.rules import ReLU, TopK
from lib.display import frontier
from lib.models import load_model

SITE = "blocks.1.hook_resid_post"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def point(name: str, l0: float, loss_recovered: float) -> dict:
    return {"name": name, "l0": l0, "loss_recovered": loss_recovered}


# ---- drift


def test_drift_fidelity_is_a_cosine():
    anchors = noise(6, 5)
    rows = anchors * torch.tensor([1.0, 3.0, -2.0, 1.0, 1.0, 0.0])[:, None]
    across = noise(5, seed=1)
    rows[3] = across - across @ anchors[3] / anchors[3].square().sum() * anchors[3]
    rows[4] = anchors[4] / anchors[4].norm() + rows[3] / rows[3].norm()
    expected = [1, 1, -1, 0]
    found = drift_fidelity(rows, anchors)
    assert found[:4].tolist() == pytest.approx(expected, abs=1e-6)
    cosine = float(rows[4] @ anchors[4] / rows[4].norm() / anchors[4].norm())
    assert float(found[4]) == pytest.approx(cosine, abs=1e-6) and 0.1 < cosine < 0.99
    assert float(found[5]) == 0
    assert drift_fidelity(rows[:0], anchors[:0]).shape == (0,)
    with pytest.raises(ValueError, match="need a row for each of 6 anchors, got 1"):
        drift_fidelity(rows[:1], anchors)


# ---- who is beaten


def test_pareto_keeps_what_no_other_beats():
    points = [
        point("dense", 32, 0.99),
        point("beaten", 16, 0.90),
        point("sparse", 8, 0.92),
        point("worse at equal l0", 8, 0.91),
        point("more latents for the same", 33, 0.99),
    ]
    assert pareto(points) == ["sparse", "dense"]
    assert pareto(points[::-1]) == ["sparse", "dense"]
    assert pareto(points[1:2]) == ["beaten"]
    assert pareto([]) == []


def test_pareto_keeps_equals_and_leaves_out_what_is_not_known():
    twins = [point("a", 8, 0.9), point("b", 8, 0.9)]
    assert pareto(twins) == ["a", "b"]
    unknown = [point("no y", 1, math.nan), point("no x", math.nan, 2)]
    assert pareto([*unknown, *twins]) == ["a", "b"]


def test_pareto_of_other_fields():
    points = [{"name": n, "kl": kl, "r2": r2} for n, kl, r2 in (("a", 1, 0.5), ("b", 2, 0.4))]
    assert pareto(points, x="kl", y="r2") == ["a"]
    with pytest.raises(KeyError, match="l0"):
        pareto(points)


# ---- between points


SWEEP = [{"name": str(l0), "l0": l0, "r2": r2} for l0, r2 in ((8, 0.9), (32, 0.96), (16, 0.94))]


def test_interpolation_is_linear_in_the_logarithm():
    for p in SWEEP:
        assert interpolated(SWEEP, p["r2"]) == pytest.approx(p["l0"])
    assert interpolated(SWEEP, 0.92) == pytest.approx(math.sqrt(8 * 16))
    assert interpolated(SWEEP, 0.945) == pytest.approx(16 * 2 ** (1 / 4))
    assert interpolated(SWEEP[::-1], 0.945) == interpolated(SWEEP, 0.945)


def test_no_extrapolation():
    for at in (0.8999, 0.9601, math.nan):
        assert math.isnan(interpolated(SWEEP, at))
    assert interpolated(SWEEP[:1], 0.9) == pytest.approx(8)
    assert math.isnan(interpolated(SWEEP[:1], 0.91))


def test_of_equal_points_the_sparsest_counts():
    for twins in ([5, 7], [7, 5]):
        points = [{"r2": 0.9, "l0": l0} for l0 in twins] + [{"r2": 0.95, "l0": 20}]
        assert interpolated(points, 0.9) == pytest.approx(5)
        assert interpolated(points, 0.925) == pytest.approx(10)


def test_interpolation_of_other_fields():
    points = [{"l0": 4.0, "kl": 0.4, "loss_recovered": -0.2}, {"l0": 16.0, "kl": 0.1}]
    points[1]["loss_recovered"] = 0.4
    assert interpolated(points, 8.0, x="l0", y="kl") == pytest.approx(0.25)  # halfway in log(l0)
    assert interpolated(points, 8.0, x="l0", y="loss_recovered") == pytest.approx(0.1)
    assert math.isnan(interpolated(points, 20.0, x="l0", y="kl"))


def test_interpolation_refuses():
    with pytest.raises(ValueError, match="need at least one point to interpolate, got none"):
        interpolated([], 0.9)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"need l0 above 0 at every point, got {bad}"):
            interpolated([*SWEEP, {"l0": bad, "r2": 0.5}], 0.9)


# ---- points of a model's dictionaries


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = load_model(paths.shipped_dir() / "models" / "tiny-gemma2", device="cpu")
    corpus = load_corpus("world", tokenizer, n_tokens=1500, seq_len=64, split="test", seed=9)
    source = Harvester([model], corpus, HarvestConfig(hook_names=(SITE,)))
    found = load_dictionaries(paths.shipped_dir() / "saes" / "tiny-gemma2")
    return model, corpus, source, found


def test_points_are_what_the_parts_measure(shipped):
    model, corpus, source, found = shipped
    torch.manual_seed(0)
    shape = DictionaryConfig(site_dims=(128,), d_sae=64, rule=TopK(k=4))
    named = {"topk k16": found["topk"], "random k4": Dictionary(shape).eval()}
    blocks = (source.block(i) for i in range(source.n_blocks))  # once only
    points = frontier_points(named, model, corpus, SITE, blocks)
    assert [p["name"] for p in points] == list(named)
    assert [p["recipe"] for p in points] == ["topk", "random"]
    for p, dictionary in zip(points, named.values(), strict=True):
        quality = reconstruction(dictionary, (source.block(i) for i in range(source.n_blocks)))
        losses = patched_losses(model, dictionary, corpus, SITE)
        for key in ("l0", "r2", "fvu", "dead"):
            assert p[key] == getattr(quality, key), key
        for key in ("ce_patched", "kl", "loss_recovered"):
            assert p[key] == pytest.approx(getattr(losses, key), rel=1e-6), key
    assert points[0]["loss_recovered"] > 0.99 > points[1]["loss_recovered"]
    assert pareto(points) == ["random k4", "topk k16"]
    assert {trace.name for trace in frontier(points).data} == {"topk", "random"}


def test_points_refuse(shipped):
    model, corpus, source, _ = shipped
    blocks = [source.block(0)]
    with pytest.raises(ValueError, match="need at least one dictionary, got none"):
        frontier_points({}, model, corpus, SITE, blocks)
    narrow = Dictionary(DictionaryConfig(site_dims=(8,), d_sae=16, rule=ReLU()))
    with pytest.raises(ValueError, match=f"need a dictionary of width 128 at {SITE}, got 8"):
        frontier_points({"narrow": narrow}, model, corpus, SITE, blocks)
    fits = Dictionary(DictionaryConfig(site_dims=(128,), d_sae=16, rule=ReLU())).eval()
    with pytest.raises(ValueError, match="need activations that vary, got 0 tokens"):
        frontier_points({"relu": fits}, model, corpus, SITE, [])
