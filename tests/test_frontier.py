"""Dictionaries side by side: points, and what a sweep has in between."""

import math

import pytest
import torch

from lib.activations.harvest import HarvestConfig, Harvester
from lib.analysis.frontier import frontier_points, interpolated
from lib.analysis.metrics import drift_fidelity, patched_losses, reconstruction
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import ReLU, TopK
from lib.display import frontier

SITE = "blocks.1.hook_resid_post"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_drift_fidelity_is_a_cosine():
    anchors = noise(6, 5)
    rows = anchors * torch.tensor([1.0, 3.0, -2.0, 1.0, 1.0, 0.0])[:, None]
    across = noise(5, seed=1)
    rows[3] = across - across @ anchors[3] / anchors[3].square().sum() * anchors[3]
    rows[4] = anchors[4] / anchors[4].norm() + rows[3] / rows[3].norm()
    cosine = float(rows[4] @ anchors[4] / rows[4].norm() / anchors[4].norm())
    assert 0.1 < cosine < 0.99
    found = drift_fidelity(rows, anchors)
    assert found.tolist() == pytest.approx([1, 1, -1, 0, cosine, 0], abs=1e-6)
    assert float(found[5]) == 0
    assert drift_fidelity(rows[:0], anchors[:0]).shape == (0,)
    with pytest.raises(ValueError, match="need a row for each of 6 anchors, got 1"):
        drift_fidelity(rows[:1], anchors)


SWEEP = [{"name": str(l0), "l0": l0, "r2": r2} for l0, r2 in ((8, 0.9), (32, 0.96), (16, 0.94))]


def test_interpolation_is_linear_in_the_logarithm():
    for p in SWEEP:
        assert interpolated(SWEEP, p["r2"]) == pytest.approx(p["l0"])
    assert interpolated(SWEEP, 0.92) == pytest.approx(math.sqrt(8 * 16))
    assert interpolated(SWEEP, 0.945) == pytest.approx(16 * 2 ** (1 / 4))
    assert interpolated(SWEEP[::-1], 0.945) == interpolated(SWEEP, 0.945)
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


@pytest.fixture(scope="module")
def measured(gemma):
    """Model, corpus, site and blocks of activations."""
    model, tokenizer = gemma
    corpus = load_corpus("world", tokenizer, n_tokens=600, seq_len=64, split="test", seed=9)
    source = Harvester([model], corpus, HarvestConfig(hook_names=(SITE,)))
    return model, corpus, SITE, [source.block(i) for i in range(source.n_blocks)]


def test_points_are_what_the_parts_measure(measured, shipped_sae):
    model, corpus, _, blocks = measured
    torch.manual_seed(0)
    shape = DictionaryConfig(site_dims=(128,), d_sae=64, rule=TopK(k=4))
    named = {"topk k16": shipped_sae, "random k4": Dictionary(shape).eval()}
    points = frontier_points(named, model, corpus, SITE, iter(blocks))  # once only
    assert [p["name"] for p in points] == list(named)
    assert [p["recipe"] for p in points] == ["topk", "random"]
    for p, dictionary in zip(points, named.values(), strict=True):
        quality = reconstruction(dictionary, blocks)
        losses = patched_losses(model, dictionary, corpus, SITE)
        for key in ("l0", "r2", "fvu", "dead"):
            assert p[key] == getattr(quality, key), key
        for key in ("ce_patched", "kl", "loss_recovered"):
            assert p[key] == pytest.approx(getattr(losses, key), rel=1e-6), key
    assert points[0]["loss_recovered"] > 0.99 > points[1]["loss_recovered"]
    assert {trace.name for trace in frontier(points).data} == {"topk", "random"}


def test_points_refuse(measured):
    def random(d: int) -> Dictionary:
        return Dictionary(DictionaryConfig(site_dims=(d,), d_sae=16, rule=ReLU())).eval()

    *parts, blocks = measured
    for named, given, message in (
        ({}, blocks, "need at least one dictionary, got none"),
        ({"narrow": random(8)}, blocks, f"need a dictionary of width 128 at {SITE}, got 8"),
        ({"relu": random(128)}, [], "need activations that vary, got 0 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            frontier_points(named, *parts, given)
