"""Figures show what they are given; text is data."""

import math

import pytest

from lib.display import (
    ablation_bars,
    concept_heatmap,
    concept_scores,
    concept_text,
    constraint_curves,
    frequencies,
    frontier,
    l0_against_r2,
    l0_r2_curves,
    latent_text,
    losses_by_split,
    losses_by_token,
    training_curves,
)


def test_text_is_escaped_and_coloured():
    hostile = "</script><script>alert(1)</script>"
    tokens = [(hostile, {"food"}), ("\"'><b>", {'a"b'}), ("x" * 10_000, set())]
    html = concept_text([tokens], ["food"])
    assert "<script" not in html and "<b>" not in html
    assert 'title="a"b"' not in html and "a&quot;b" in html
    assert html.count("#aec7e8") == 2  # legend and token
    assert len(html) < 2_500
    with pytest.raises(ValueError, match="at most 10"):
        concept_text([], [str(i) for i in range(11)])


def test_frequencies_and_losses():
    bar = frequencies(["a", "b", "c"], [0.1, 0.5, 0.2], "t").data[0]
    assert (list(bar.x), list(bar.y)) == (["b", "c", "a"], [0.5, 0.2, 0.1])
    figure = losses_by_token(["a", "a"], [1.0, 2.0], [0.5, 0.1])
    bars = {bar.name: list(bar.y) for bar in figure.data}
    assert bars == {"exact floor": [0.5, 0.1], "model": [1.0, 2.0]}
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
    negative = latent_text([[("a", -4.0), ("b", 2.0)]])
    assert "rgba(31,119,180,1.00)" in negative and "rgba(255,127,14,0.50)" in negative


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
    scores = {"topk": {"best": 0.5, "five": 0.7}, "pca": {"best": 0.3, "five": 0.6}}
    figure = concept_scores(scores, 0.87, "t")
    bars = {bar.name: list(bar.x) for bar in figure.data}
    assert bars == {"best single latent": [0.3, 0.5], "five latents": [0.6, 0.7]}
    assert figure.layout.shapes[0].x0 == 0.87
    heat = concept_heatmap({"topk": {"food": 0.2, "animal": 0.9}}, "t").data[0]
    assert [list(row) for row in heat.z] == [[0.2, 0.9]] and list(heat.x) == ["food", "animal"]


def training() -> list[dict]:
    """Entries of steps 100, 200, … 1000; r2 rises from 0.1 to 0.95, and kl comes with the 7th."""
    entries = []
    for i in range(10):
        names = ["faithfulness", "drift"] + (["kl"] if i >= 6 else [])
        values = {
            "violations": (30.0 - 3.5 * i, -0.5, 0.01),
            "multipliers": (0.1 * i, 0.0, 0.2),
            "penalties": (0.1 + i, 0.1, 1.0),
        }
        each = {field: dict(zip(names, row, strict=False)) for field, row in values.items()}
        r2, step = 0.95 - 0.85 * (1 - i / 9) ** 4, 100 * (i + 1)
        each |= {"step": step, "tokens": 256 * step, "l0": 100.0 / (i + 1), "r2": r2}
        entries.append(each)
    return entries


def test_constraint_curves():
    history = training()
    figure = constraint_curves(history, 700, "t")
    curves = {(trace.name, trace.yaxis): trace for trace in figure.data}
    assert len(curves) == 9
    for axis, field in (("y", "violations"), ("y2", "multipliers"), ("y3", "penalties")):
        for name in ("faithfulness", "drift", "kl"):
            own = [entry for entry in history if name in entry[field]]
            curve = curves[name, axis]
            assert list(curve.x) == [entry["step"] for entry in own]
            assert list(curve.customdata) == [entry[field][name] for entry in own]
            assert curve.line.color == curves[name, "y"].line.color
            if field != "violations":
                drawn = map(math.log1p, curve.customdata) if axis == "y2" else curve.customdata
                assert list(curve.y) == pytest.approx(list(drawn))
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert legend == ["faithfulness", "drift", "kl"]
    assert len({curves[name, "y"].line.color for name in legend}) == 3
    assert figure.layout.legend.title.text == "above 0: violated"
    assert figure.layout.yaxis3.type == "log"


def test_violations_are_drawn_as_far_below_0_as_above():
    figure = constraint_curves(training(), 700, "t")
    axis, curve = figure.layout.yaxis, figure.data[0]
    assert axis.range[0] == -axis.range[1] and max(curve.y) < axis.range[1]
    assert [y > 0 for y in curve.y] == [g > 0 for g in curve.customdata]
    places = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    assert list(places) == ["-10", "-1", "-0.1", "0", "0.1", "1", "10"]
    tenth = {**training()[0], "violations": {"faithfulness": 0.1, "drift": math.nan}}
    drawn = constraint_curves([tenth], None, "t").data
    assert drawn[0].y[0] == places["0.1"] and math.isnan(drawn[1].y[0])


def phases(figure) -> list[tuple[str, float, float]]:
    """Name, start and end of each shaded phase, checked to be in every panel."""
    panels = len({trace.yaxis for trace in figure.data})
    shades = [s for s in figure.layout.shapes if s.type == "rect" and "domain" in s.yref]
    names = [a.text for a in figure.layout.annotations if a.text.startswith("phase")]
    spans = list(dict.fromkeys((s.x0, s.x1) for s in shades))
    assert len(shades) == panels * len(spans)
    return [(name, *span) for name, span in zip(names, spans, strict=True)]


def test_phases_are_marked_in_every_panel():
    figure = constraint_curves(training(), 700, "t")
    assert phases(figure) == [("phase 1", 100, 700), ("phase 2", 700, 1000)]
    lines = [s for s in figure.layout.shapes if s.type == "line" and s.x0 == s.x1]
    assert [line.x0 for line in lines] == [700] * 3
    only = constraint_curves(training(), None, "t")
    assert phases(only) == [("phase 1", 100, 1000)]
    in_tokens = l0_r2_curves(training(), 0.95, 700)
    assert phases(in_tokens) == [("phase 1", 25600, 179200), ("phase 2", 179200, 256000)]
    assert phases(l0_r2_curves(training(), 0.95, None)) == [("phase 1", 25600, 256000)]


def test_l0_and_r2_over_tokens():
    history = training()
    figure = l0_r2_curves(history, 0.95, 700)
    for trace, field in zip(figure.data, ("l0", "r2"), strict=True):
        assert list(trace.x) == [entry["tokens"] for entry in history]
        assert list(trace.y) == [entry[field] for entry in history]
    assert (figure.layout.yaxis.type, figure.layout.yaxis2.type) == ("log", None)
    (band,) = (s for s in figure.layout.shapes if s.type == "rect" and s.yref == "y2")
    assert (band.y0, band.y1) == pytest.approx((0.94, 0.96))
    low, high = figure.layout.yaxis2.range
    assert 0.1 < low <= min(entry["r2"] for entry in history[5:]) and high > 0.96
    missed = l0_r2_curves([{**entry, "r2": 0.4} for entry in history], 0.95, None)
    assert missed.layout.yaxis2.range[0] <= 0.4


def test_l0_against_r2():
    points = [
        {"name": "topk k32", "recipe": "topk", "l0": 32.0, "r2": 0.97},
        {"name": "topk k8", "recipe": "topk", "l0": 8.0, "r2": 0.9},
        {"name": "spalf", "recipe": "spalf", "l0": 14.0, "r2": 0.95},
    ]
    figure = l0_against_r2(points, r2_target=0.95)
    topk, spalf = figure.data
    assert (list(topk.x), list(topk.y)) == ([8, 32], pytest.approx([0.1, 0.03]))
    assert (topk.mode, spalf.mode) == ("markers+lines", "markers")
    assert (topk.marker.symbol, spalf.marker.symbol) == ("circle", "star")
    assert topk.marker.color == frontier([{**points[0], "loss_recovered": 1}]).data[0].marker.color
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    (target,), (label,) = figure.layout.shapes, figure.layout.annotations
    assert target.y0 == pytest.approx(0.05) and label.y == pytest.approx(math.log10(0.05))
    assert not l0_against_r2(points).layout.shapes


def test_ablation_bars():
    full = {"name": "full", "l0": 13.8, "r2": 0.95}
    figure = ablation_bars([full, {"name": "no whitening", "l0": 16.0, "r2": 0.949}])
    (bars,) = figure.data
    assert (list(bars.y), list(bars.x)) == (["full", "no whitening"], [13.8, 16.0])
    assert list(bars.text) == ["l0 13.8, r2 0.950", "l0 16.0, r2 0.949"]
    assert bars.marker.color[0] != bars.marker.color[1]
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1, line.line.dash) == (13.8, 13.8, "dot")


def test_nothing_to_draw():
    for draw in (
        lambda: constraint_curves([], None, "t"),
        lambda: l0_r2_curves([], 0.95, None),
        lambda: ablation_bars([]),
    ):
        with pytest.raises(ValueError, match="need at least one row to draw, got none"):
            draw()
