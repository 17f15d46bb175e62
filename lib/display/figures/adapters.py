"""Plotly figures of sparse adapters: what few latents keep, and what each is needed for."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from lib.display.figures.latents import shown
from lib.display.figures.plots import LAYOUT, require_rows

SIDE_COLOURS = {"read": "#1f77b4", "write": "#d62728"}
"""A side of an adapter keeps its colour in every notebook."""

METHOD_COLOURS = {"dense": "#000000", "l1": "#7f7f7f", "topk": "#1f77b4"}
"""A sparsity method keeps its colour in every notebook."""

REFERENCE = "#9aa0a6"
_SHARE = {"tickformat": ".0%", "range": [-0.03, 1.05]}
_ZERO = 0.5  # where a logarithmic axis of counts shows 0


def sparsity_behaviour(
    points: Sequence[Mapping[str, Any]], references: Mapping[str, Sequence[float]]
) -> go.Figure:
    """Behaviour against the number of latents: mean and range over seeds; up and left is better.

    Args:
        points: for each adapter `method`, `setting` (what the seeds of a mark share: a number of
            latents that was asked for, a penalty's weight), `n_latents` (read and written
            together) and `share` (of prompts that show the behaviour, 0 to 1).
        references: by name, shares over seeds or draws that are drawn as a line and a band, such
            as the dense adapter's and random supports'.

    Raises:
        ValueError: no points, or a reference without values.
    """
    require_rows(points)
    figure = go.Figure()
    by_method: dict[str, dict[Any, list[Mapping[str, Any]]]] = {}
    for point in points:
        by_method.setdefault(point["method"], {}).setdefault(point["setting"], []).append(point)
    for method, groups in by_method.items():
        marks = [(fmean([float(p["n_latents"]) for p in g]), g) for g in groups.values()]
        marks.sort(key=lambda mark: mark[0])
        figure.add_scatter(
            x=[max(n, _ZERO) for n, _ in marks],
            name=shown(method),
            mode="markers+lines",
            marker={"size": 9},
            line={"color": METHOD_COLOURS.get(method)},
            **_mean_and_range([[float(p["share"]) for p in group] for _, group in marks]),
        )
    for name, values in references.items():
        _reference(figure, name, values)
    sizes = [len(group) for groups in by_method.values() for group in groups.values()]
    n = " to ".join(str(size) for size in sorted({min(sizes), max(sizes)}))
    title = f"Behaviour kept with so many latents (mean and range, n = {n})"
    figure.update_layout(title=title, height=460, **LAYOUT)
    counts = [p["n_latents"] for p in points]
    ticks = _doubling_axis(min(counts), max(counts))
    figure.update_xaxes(title="latents read and written (log; fewer is better)", **ticks)
    figure.update_yaxes(title="prompts with the behaviour (higher is better)", **_SHARE)
    return figure


def weight_concentration(weights: Mapping[str, Tensor]) -> go.Figure:
    """Share of the squared weights that the n strongest latents hold; up and left is sparser.

    The dotted line is Gaussian noise on as many latents as the longest of `weights`.

    Args:
        weights: by name, one strength per latent, of any sign.

    Raises:
        ValueError: nothing to draw, or weights that are all zero.
    """
    if not weights:
        raise ValueError("need weights to draw, got none")
    n = max(len(w) for w in weights.values())
    noise = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    figure = go.Figure()
    for name, w in [*weights.items(), ("gaussian noise", noise)]:
        if not w.any():
            raise ValueError(f"need weights that are not all zero, got {name!r}")
        squares = w.detach().cpu().double().square().sort(descending=True).values
        shares = squares.cumsum(0) / squares.sum()
        ranks = torch.logspace(0, math.log10(len(shares)), 300).round().long().unique()
        figure.add_scatter(
            x=ranks.tolist(),
            y=shares[ranks - 1].tolist(),
            name=shown(name),
            line={"color": REFERENCE, "dash": "dot"} if w is noise else {},
            hovertemplate="the strongest %{x}: %{y:.1%}",
        )
    figure.update_layout(title="How few latents hold the weights", height=420, **LAYOUT)
    figure.update_xaxes(title="strongest latents (log)", **_doubling_axis(1, n))
    figure.update_yaxes(title="share of Σ w² (higher is sparser)", **_SHARE)
    return figure


def removal(rows: Sequence[Mapping[str, Any]], labels: Mapping[int, str]) -> go.Figure:
    """Behaviour that is left without the strongest n latents of a side, and without each one.

    Args:
        rows: as `lib.analysis.causal.causal_check` gives them.
        labels: names of latents.

    Raises:
        ValueError: no rows.
    """
    require_rows(rows)
    figure = make_subplots(rows=1, cols=2, column_widths=[0.45, 0.55], horizontal_spacing=0.3)
    names: list[str] = []
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side]
        together, alone = ([r for r in own if r["alone"] is kind] for kind in (False, True))
        figure.add_scatter(
            x=[r["n_removed"] for r in together],
            y=[r["value"] for r in together],
            name=side,
            line={"color": SIDE_COLOURS[side]},
            mode="markers+lines",
            row=1,
            col=1,
        )
        bars = go.Bar(
            x=[r["value"] for r in alone],
            y=list(range(len(names), len(names) + len(alone))),
            orientation="h",
            marker_color=SIDE_COLOURS[side],
            showlegend=False,
        )
        figure.add_trace(bars, row=1, col=2)
        names += [_name(side, r["latent"], labels) for r in alone]
    whole = next(row["value"] for row in rows if row["n_removed"] == 0)
    figure.add_vline(x=whole, line_dash="dot", line_width=1, row=1, col=2)
    place = {"orientation": "h", "x": 0.3, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}
    figure.update_layout(title="Behaviour that is left", height=max(420, 150 + 22 * len(names)))
    figure.update_layout(legend=place, **LAYOUT)
    figure.update_xaxes(title="strongest latents removed", row=1, col=1)
    figure.update_yaxes(title="prompts with the behaviour", **_SHARE, row=1, col=1)
    figure.update_xaxes(title="without this one (dotted: with all)", **_SHARE, row=1, col=2)
    ticks = {"tickvals": list(range(len(names))), "ticktext": [shown(name) for name in names]}
    figure.update_yaxes(**ticks, autorange="reversed", row=1, col=2)
    return figure


def _name(side: str, latent: int, labels: Mapping[int, str]) -> str:
    place = f"{side} {latent}"
    return f"{labels[latent]} ({place})" if latent in labels else place


def _mean_and_range(groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A scatter's marks at the means of groups of shares, with bars over their ranges."""
    means = [fmean(group) for group in groups]
    ups = [max(group) - mean for group, mean in zip(groups, means, strict=True)]
    downs = [mean - min(group) for group, mean in zip(groups, means, strict=True)]
    return {
        "y": means,
        "error_y": {"array": ups, "arrayminus": downs, "symmetric": False, "thickness": 1},
        "text": [f"{min(g):.1%} to {max(g):.1%}, n = {len(g)}" for g in groups],
        "hovertemplate": "%{x} latents: %{y:.1%}<br>%{text}",
    }


def _reference(figure: go.Figure, name: str, values: Sequence[float]) -> None:
    """A line at the mean of `values` over the whole width, and a band over their range."""
    if not values:
        raise ValueError(f"need values for the reference {name!r}, got none")
    colour, mean = METHOD_COLOURS.get(name, REFERENCE), fmean(values)
    figure.add_hrect(y0=min(values), y1=max(values), fillcolor=colour, opacity=0.15, line_width=0)
    figure.add_hline(
        y=mean,
        line={"dash": "dot", "width": 1.5, "color": colour},
        annotation_text=f"{shown(name)} {mean:.1%} (n = {len(values)})",
        annotation_position="top left" if mean > 0.5 else "top right",
    )


def _doubling_axis(low: int, high: int) -> dict[str, Any]:
    """A logarithmic axis of counts with a tick at each power of two; 0 lies at the left end."""
    powers = range(math.floor(math.log2(max(low, 1))), math.ceil(math.log2(max(high, 2))) + 1)
    zero = {_ZERO: "0"} if low < 1 else {}
    ticks = zero | {2.0**power: f"{2**power:,}" for power in powers}
    ends = [math.log10(min(ticks)) - 0.05, math.log10(max(ticks)) + 0.05]
    return {"type": "log", "tickvals": [*ticks], "ticktext": [*ticks.values()], "range": ends}
