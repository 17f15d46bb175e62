"""Plotly figures of numbers that are already computed."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

COLOURS = {"floor": "#9aa0a6", "model": "#1f77b4"}
"""A quantity keeps its colour in every notebook."""

_LAYOUT = {"template": "plotly_white", "margin": {"l": 60, "r": 20, "t": 50, "b": 60}}


def frequencies(names: Sequence[str], shares: Sequence[float], title: str) -> go.Figure:
    """Bars of shares, most frequent first, on a logarithmic axis."""
    order = sorted(range(len(names)), key=lambda i: -shares[i])
    bars = go.Bar(x=[names[i] for i in order], y=[shares[i] for i in order])
    figure = go.Figure(bars.update(marker_color=COLOURS["model"]))
    figure.update_layout(title=title, height=420, **_LAYOUT)
    figure.update_yaxes(type="log", title="share of tokens (log)", tickformat=".1%")
    figure.update_xaxes(tickangle=-60, dtick=1)
    return figure


def losses_by_token(
    tokens: Sequence[str], model: Sequence[float], floor: Sequence[float]
) -> go.Figure:
    """Nats of every token of one chat: the model's beside the exact floor; lower is better."""
    places = list(range(len(tokens)))
    figure = go.Figure(
        [
            go.Bar(x=places, y=list(floor), name="exact floor", marker_color=COLOURS["floor"]),
            go.Bar(x=places, y=list(model), name="model", marker_color=COLOURS["model"]),
        ]
    )
    figure.update_layout(
        title="What each token costs, given those before it", height=380, barmode="group", **_LAYOUT
    )
    figure.update_xaxes(tickvals=places, ticktext=list(tokens), tickangle=-60)
    figure.update_yaxes(title="nats (lower is better)")
    return figure


def losses_by_split(losses: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Mean nats per token for each split, from `{split: {"model": …, "floor": …}}`."""
    splits = list(losses)
    bars = [
        go.Bar(
            x=splits,
            y=[losses[split][kind] for split in splits],
            name={"model": "model", "floor": "exact floor"}[kind],
            marker_color=COLOURS[kind],
            text=[f"{losses[split][kind]:.3f}" for split in splits],
        )
        for kind in ("floor", "model")
    ]
    figure = go.Figure(bars)
    figure.update_layout(title="Loss against the floor", height=380, barmode="group", **_LAYOUT)
    figure.update_yaxes(title="nats per token (lower is better)")
    return figure
