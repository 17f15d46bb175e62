"""Figures of latents and adapters hold what they are given; text is data."""

import math

import pytest
import torch

from lib.display import (
    activation_histogram,
    dose_curves,
    logit_table,
    removal,
    sparsity_behaviour,
    weight_concentration,
)
from lib.display.figures.adapters import METHOD_COLOURS, SIDE_COLOURS
from lib.latents.steering import DoseResponse

HOSTILE = '</script><script>alert("1")</script><b>$x$'
SHOWN = '&lt;/script&gt;&lt;script&gt;alert("1")&lt;/script&gt;&lt;b&gt;&#36;x&#36;'


def traces(figure) -> dict:
    return {trace.name: trace for trace in figure.data}


def test_histogram():
    counts, edges = torch.tensor([5, 0, 20]), torch.tensor([-1.0, 0.0, 1.0, 3.0])
    figure = activation_histogram(counts, edges, HOSTILE)
    (bars,) = figure.data
    assert (list(bars.x), list(bars.y), list(bars.width)) == ([-0.5, 0.5, 2], [5, 0, 20], [1, 1, 2])
    assert figure.layout.title.text == SHOWN and figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.range[0] < 0 and math.log10(20) < figure.layout.yaxis.range[1] < 2
    dead = activation_histogram(torch.zeros(3).long(), torch.linspace(0, 1, 4), "dead")
    assert list(dead.data[0].y) == [0, 0, 0]
    with pytest.raises(ValueError, match="need 4 edges, got 3"):
        activation_histogram(counts, edges[1:], "t")


def test_logit_table():
    row = {"promoted": [("le", 2.0), ("la", 1.5)], "suppressed": [("the", -1.25)]}
    long = [("é" * 9000, -1.0)]
    hostile = {"name": HOSTILE, "promoted": [(HOSTILE[:15], 3.0)], "suppressed": long}
    figure = logit_table([{"name": "french", **row}, hostile])
    names, promoted, suppressed = figure.data[0].cells.values
    assert list(names) == ["french", SHOWN]
    plain = promoted[0].replace("\u2068", "").replace("\u2069", "").replace("\u00a0", " ")
    assert plain == "le +2.00 · la +1.50" and "the" in suppressed[0] and "-1.25" in suppressed[0]
    assert "&lt;/script&gt;" in promoted[1] and "<" not in promoted[1]
    assert len(suppressed[1]) < 60 and "…" in suppressed[1]
    page = figure.to_html(include_plotlyjs=False)
    plain = logit_table([{"name": "french", **row}]).to_html(include_plotlyjs=False)
    assert page.count("<script") == plain.count("<script")
    with pytest.raises(ValueError, match="need at least one row to draw, got none"):
        logit_table([])


def points() -> list[dict]:
    """Three seeds; of l1 each seed ends at another number of latents."""
    return [
        {"method": method, "setting": setting, "n_latents": n, "share": share}
        for method, setting, n, shares in (
            ("topk", 8, 8, (0.7, 0.8, 0.9)),
            ("topk", 2, 2, (0.1, 0.2, 0.3)),
            ("topk", 0, 0, (0.0, 0.0, 0.0)),
            ("l1", "0.01", 100, (0.5,)),
            ("l1", "0.01", 120, (0.5,)),
        )
        for share in shares
    ]


def test_sparsity_against_behaviour():
    references = {"dense": [0.9, 1.0], "random support": [0.0, 0.02, 0.04]}
    figure = sparsity_behaviour(points(), references)
    topk, l1 = traces(figure)["topk"], traces(figure)["l1"]
    assert list(topk.x) == [0.5, 2, 8] and list(topk.y) == pytest.approx([0, 0.2, 0.8])
    assert list(topk.error_y.array) == pytest.approx([0, 0.1, 0.1])
    assert list(topk.error_y.arrayminus) == pytest.approx([0, 0.1, 0.1])
    assert topk.text[2] == "70.0% to 90.0%, n = 3"
    assert (list(l1.x), list(l1.y)) == ([110], [0.5])
    assert topk.line.color == METHOD_COLOURS["topk"] != l1.line.color
    assert "n = 2 to 3" in figure.layout.title.text
    lines = [(s.y0, s.y1) for s in figure.layout.shapes if s.type == "line"]
    bands = [(s.y0, s.y1) for s in figure.layout.shapes if s.type == "rect"]
    assert lines == [(0.95, 0.95), (0.02, 0.02)] and bands == [(0.9, 1.0), (0.0, 0.04)]
    notes = [a.text for a in figure.layout.annotations]
    assert notes == ["dense 95.0% (n = 2)", "random support 2.0% (n = 3)"]
    axis = figure.layout.xaxis
    assert axis.ticktext[:3] == ("0", "1", "2") and axis.tickvals[:3] == (0.5, 1, 2)
    assert axis.range[0] < math.log10(0.5) and axis.range[1] > math.log10(120)
    figure = sparsity_behaviour([{**points()[0], "method": HOSTILE}], {HOSTILE: [0.5]})
    assert figure.data[0].name == SHOWN and SHOWN in figure.layout.annotations[0].text
    with pytest.raises(ValueError, match="need at least one row to draw"):
        sparsity_behaviour([], {})
    with pytest.raises(ValueError, match="need values for the reference 'dense', got none"):
        sparsity_behaviour(points(), {"dense": []})


def test_weight_concentration():
    one = torch.zeros(64)
    one[5] = -3
    found = traces(weight_concentration({"one": one, "even": torch.ones(1000), HOSTILE: one}))
    assert set(found["one"].y) == {1.0} and found["one"].x[-1] == 64
    even = found["even"]
    assert list(even.y) == pytest.approx([x / 1000 for x in even.x])
    assert (even.x[0], even.x[-1], SHOWN in found) == (1, 1000, True)
    noise = found["gaussian noise"]
    drawn = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0)).square()
    shares = drawn.sort(descending=True).values.cumsum(1).mean(0) / drawn.sum(1).mean()
    expected = shares[torch.tensor(noise.x) - 1]
    assert list(noise.y) == pytest.approx(expected.tolist(), abs=0.01)
    with pytest.raises(ValueError, match="need weights that are not all zero, got 'none'"):
        weight_concentration({"none": torch.zeros(3)})
    with pytest.raises(ValueError, match="need weights to draw"):
        weight_concentration({})


def test_doses():
    control = ((0.1, 0.2, 0.0), (0.3, 0.2, 0.1))
    found = DoseResponse(
        doses=(-1.0, 0.0, 2.0), values=(0.0, 0.2, 0.9), baseline=0.25, control=control
    )
    figure = dose_curves({HOSTILE: found}, "answers in <b>French</b>")
    curve, band, mean = figure.data
    assert (list(curve.x), list(curve.y)) == ([-1, 0, 2], [0.0, 0.2, 0.9])
    assert list(mean.y) == pytest.approx([0.2, 0.2, 0.05]) and mean.line.dash == "dash"
    assert list(band.x) == [-1, 0, 2, 2, 0, -1] and band.fill == "toself"
    assert list(band.y) == pytest.approx([0.3, 0.2, 0.1, 0.0, 0.2, 0.1])
    assert figure.layout.shapes[0].y0 == 0.25 and curve.name == SHOWN
    assert figure.layout.yaxis.title.text == "answers in &lt;b&gt;French&lt;/b&gt;"
    with pytest.raises(ValueError, match="need at least one response"):
        dose_curves({}, "b")


def rows() -> list[dict]:
    return [
        dict(zip(("side", "latent", "n_removed", "alone", "value"), row, strict=True))
        for row in (
            ("read", -1, 0, False, 0.9),
            ("read", 7, 1, True, 0.5),
            ("read", 7, 1, False, 0.5),
            ("read", 3, 1, True, 0.8),
            ("read", 3, 2, False, 0.1),
            ("write", -1, 0, False, 0.9),
            ("write", 7, 1, True, 0.2),
            ("write", 7, 1, False, 0.2),
        )
    ]


def test_removal():
    figure = removal(rows(), {7: HOSTILE})
    read, read_bars, write, write_bars = figure.data
    assert (list(read.x), list(read.y)) == ([0, 1, 2], [0.9, 0.5, 0.1])
    assert (list(write.x), list(write.y)) == ([0, 1], [0.9, 0.2])
    assert (list(read_bars.x), list(read_bars.y)) == ([0.5, 0.8], [0, 1])
    assert (list(write_bars.x), list(write_bars.y)) == ([0.2], [2])
    names = list(figure.layout.yaxis2.ticktext)
    assert names == [f"{SHOWN} (read 7)", "read 3", f"{SHOWN} (write 7)"]
    assert read.line.color == read_bars.marker.color == SIDE_COLOURS["read"]
    assert figure.layout.shapes[0].x0 == 0.9
    with pytest.raises(ValueError, match="need at least one row to draw"):
        removal([], {})
