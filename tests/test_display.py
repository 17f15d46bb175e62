"""Figures show what they are given; text is data."""

import pytest

from lib.display import concept_text, frequencies, losses_by_split, losses_by_token


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
