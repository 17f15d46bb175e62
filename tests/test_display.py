"""Figures show what they are given; text is data."""

import pytest

from lib.display import (
    concept_heatmap,
    concept_scores,
    concept_text,
    frequencies,
    frontier,
    latent_text,
    losses_by_split,
    losses_by_token,
    training_curves,
)


def test_text_is_escaped_and_coloured():
    hostile = "</script><script>alert(1)</script>"
    html = concept_text(
        [[(hostile, {"food"}), ("\"'><b>", {'a"b'}), ("x" * 10_000, set())]], ["food"]
    )
    assert "<script" not in html and "<b>" not in html
    assert 'title="a"b"' not in html and "a&quot;b" in html
    assert html.count("#aec7e8") == 2  # legend and token
    assert len(html) < 2_500
    with pytest.raises(ValueError, match="at most 10"):
        concept_text([], [str(i) for i in range(11)])


def test_frequencies_are_sorted():
    bar = frequencies(["a", "b", "c"], [0.1, 0.5, 0.2], "t").data[0]
    assert list(bar.x) == ["b", "c", "a"]
    assert list(bar.y) == [0.5, 0.2, 0.1]


def test_losses():
    figure = losses_by_token(["a", "a"], [1.0, 2.0], [0.5, 0.1])
    assert {bar.name: list(bar.y) for bar in figure.data} == {
        "exact floor": [0.5, 0.1],
        "model": [1.0, 2.0],
    }
    assert list(figure.layout.xaxis.ticktext) == ["a", "a"]
    figure = losses_by_split({"test": {"model": 0.6, "floor": 0.5}})
    assert [bar.y[0] for bar in figure.data] == [0.5, 0.6]


def test_latent_text_is_escaped_and_shaded_by_value():
    hostile = "</script><img src=x onerror=alert(1)>"
    html = latent_text([[(hostile, 2.0), ("b", 1.0), ("c", 0.0)], [("x" * 9000, 0.0)]], "<i>9</i>")
    assert "<script" not in html and "<img" not in html and "<i>" not in html
    assert [html.count(f"14,{share})") for share in ("1.00", "0.50", "0.00")] == [1, 1, 2]
    assert len(html) < 2_000
    assert "0.00" in latent_text([[("silent", 0.0)]])


def test_frontier_joins_a_recipe_and_keeps_its_colour():
    points = [
        {"name": "topk k32", "recipe": "topk", "l0": 32.0, "loss_recovered": 0.99},
        {"name": "topk k8", "recipe": "topk", "l0": 8.0, "loss_recovered": 0.9},
        {"name": "gated", "recipe": "gated", "l0": 16.0, "loss_recovered": 0.95},
    ]
    topk, gated = frontier(points).data
    assert (list(topk.x), list(topk.y), topk.mode) == ([8, 32], [0.9, 0.99], "markers+lines")
    assert gated.mode == "markers" and topk.marker.color != gated.marker.color
    curve = training_curves({"topk k8": [{"tokens": 10, "fvu": 0.5}, {"tokens": 20, "fvu": 0.2}]})
    assert curve.data[0].line.color == topk.marker.color
    assert (list(curve.data[0].x), list(curve.data[0].y)) == ([10, 20], [0.5, 0.2])


def test_concept_figures():
    figure = concept_scores(
        {"topk": {"best": 0.5, "five": 0.7}, "pca": {"best": 0.3, "five": 0.6}}, 0.87, "t"
    )
    assert {bar.name: list(bar.x) for bar in figure.data} == {
        "best single latent": [0.3, 0.5],
        "five latents": [0.6, 0.7],
    }
    assert figure.layout.shapes[0].x0 == 0.87
    heat = concept_heatmap({"topk": {"food": 0.2, "animal": 0.9}}, "t").data[0]
    assert [list(row) for row in heat.z] == [[0.2, 0.9]] and list(heat.x) == ["food", "animal"]
