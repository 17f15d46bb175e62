"""Plotly figures of single latents: how they fire, what they write, what doses of them do.

Tokens and labels come from data. Plotly draws some HTML tags and, where a page has MathJax, TeX in
texts, so both are escaped.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape, unescape
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.colors import qualitative
from torch import Tensor

from lib.display.figures.plots import COLOURS, LAYOUT, require_rows
from lib.latents.steering import DoseResponse

_NO_BREAK = "\u00a0"


def activation_histogram(
    counts: Int[Tensor, " bins"], edges: Float[Tensor, " bins_plus_1"], title: str
) -> go.Figure:
    """How often a latent has which value, where it fires; counts are on a logarithmic axis.

    Args:
        counts, edges: as `LatentRecord.histogram` gives them.

    Raises:
        ValueError: another number of edges than one more than counts.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"need {len(counts) + 1} edges, got {len(edges)}")
    bars = go.Bar(
        x=((edges[1:] + edges[:-1]) / 2).tolist(),
        y=counts.tolist(),
        width=edges.diff().tolist(),
        marker={"color": COLOURS["model"], "line": {"width": 0.5, "color": "white"}},
        hovertemplate="%{x:.3g}<br>%{y} tokens<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_layout(title=shown(title), height=320, **LAYOUT)
    figure.update_xaxes(title="activation where the latent fires (raw unit)")
    most = math.log10(max([1, *counts.tolist()]))
    figure.update_yaxes(title="tokens (log)", type="log", dtick=1, range=[-0.3, most + 0.1])
    return figure


def logit_table(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """What each written latent does to the next token, by its direct path to the logits.

    Args:
        rows: for each latent `name`, and `promoted` and `suppressed`: pairs of a token and its
            logit, the strongest first.

    Raises:
        ValueError: no rows.
    """
    require_rows(rows)
    columns = [
        [shown(row["name"]) for row in rows],
        [_tokens(row["promoted"]) for row in rows],
        [_tokens(row["suppressed"]) for row in rows],
    ]
    names = ["<b>written latent</b>", "<b>promotes (logit)</b>", "<b>suppresses (logit)</b>"]
    header = {"values": names, "align": "left", "fill_color": "#e8eaed"}
    fills = ["#ffffff", "#eaf4ea", "#fbeaea"]
    cells = {"values": columns, "align": "left", "height": 24, "fill_color": fills}
    figure = go.Figure(go.Table(columnwidth=[2, 3, 3], header=header, cells=cells))
    longest = [max(len(unescape(column[i])) for column in columns) for i in range(len(rows))]
    height = 110 + sum(14 + 16 * math.ceil(length / 50) for length in longest)
    margin = {"l": 20, "r": 20, "t": 50, "b": 10}
    title = "Tokens that the written latents favour"
    figure.update_layout(title=title, height=height, **LAYOUT | {"margin": margin})
    return figure


def dose_curves(responses: Mapping[str, DoseResponse], behaviour: str) -> go.Figure:
    """Behaviour under doses of latents; dashed: mean and range of random directions of equal norm.

    Args:
        responses: by name, as `lib.latents.steering.dose_response` gives them.
        behaviour: what was measured, with its unit.

    Raises:
        ValueError: nothing to draw.
    """
    if not responses:
        raise ValueError("need at least one response to draw, got none")
    figure = go.Figure()
    for (name, found), colour in zip(responses.items(), itertools.cycle(qualitative.D3)):
        name, doses = shown(name), list(found.doses)
        look = {"line_color": colour, "mode": "markers+lines"}
        figure.add_scatter(x=doses, y=list(found.values), name=name, **look)
        _band(figure, doses, found.control_low, found.control_high, colour)
        look = {"line": {"color": colour, "dash": "dash", "width": 1}, "mode": "lines"}
        control = f"{len(found.control)} random for {name}"
        figure.add_scatter(x=doses, y=list(found.control_mean), name=control, **look)
        figure.add_hline(y=found.baseline, line={"color": colour, "dash": "dot", "width": 1})
    figure.update_layout(title="Dose and response (dotted: unchanged)", height=420, **LAYOUT)
    figure.update_xaxes(title="dose (typical activations of the latent)")
    figure.update_yaxes(title=shown(behaviour))
    return figure


def shown(text: str, max_chars: int = 60) -> str:
    """Text for plotly that shows as it is; longer ones are cut, with a sign."""
    text = text if len(text) <= max_chars else f"{text[:max_chars]}…"
    return escape(text, quote=False).replace("$", "&#36;")


def _band(
    figure: go.Figure, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str
) -> None:
    """Shade what lies between `low` and `high`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)",
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def _tokens(pairs: Sequence[tuple[str, float]]) -> str:
    """Tokens and logits, each pair on one line; a token from right to left moves no other."""
    isolated = ((f"\u2068{shown(token, 20)}\u2069", value) for token, value in pairs)
    return " · ".join(f"{token}{_NO_BREAK}{value:+.2f}" for token, value in isolated)
