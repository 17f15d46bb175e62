"""Plotly figures of numbers that are already computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

COLOURS = {"floor": "#9aa0a6", "model": "#1f77b4"}
"""A quantity keeps its colour in every notebook."""

RECIPE_COLOURS = {
    "standard": "#7f7f7f", "standard_resample": "#a5a5a5", "ghost": "#c7c7c7",
    "p_anneal": "#bcbd22", "entropy": "#17becf", "gated": "#e377c2", "gated_anneal": "#9467bd",
    "jumprelu": "#d62728", "jumprelu_target": "#ff9896", "topk": "#1f77b4", "batchtopk": "#2ca02c",
    "matryoshka": "#ff7f0e", "spalf": "#000000",
}  # fmt: skip
"""A recipe keeps its colour in every notebook."""

LAYOUT = {"template": "plotly_white", "margin": {"l": 60, "r": 20, "t": 50, "b": 60}}


def frequencies(names: Sequence[str], shares: Sequence[float], title: str) -> go.Figure:
    """Bars of shares, most frequent first, on a logarithmic axis."""
    order = sorted(range(len(names)), key=lambda i: -shares[i])
    bars = go.Bar(x=[names[i] for i in order], y=[shares[i] for i in order])
    figure = go.Figure(bars.update(marker_color=COLOURS["model"]))
    figure.update_layout(title=title, height=420, **LAYOUT)
    figure.update_yaxes(type="log", title="share of tokens (log)", tickformat=".1%")
    figure.update_xaxes(tickangle=-60, dtick=1)
    return figure


def losses_by_token(
    tokens: Sequence[str], model: Sequence[float], floor: Sequence[float]
) -> go.Figure:
    """Nats of every token of one chat: the model's beside the exact floor; lower is better."""
    places = list(range(len(tokens)))
    title = "What each token costs, given those before it"
    figure = _beside_the_floor(places, {"floor": floor, "model": model}, title)
    figure.update_xaxes(tickvals=places, ticktext=list(tokens), tickangle=-60)
    figure.update_yaxes(title="nats (lower is better)")
    return figure


def losses_by_split(losses: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Mean nats per token for each split, from `{split: {"model": …, "floor": …}}`."""
    kinds = {kind: [of[kind] for of in losses.values()] for kind in ("floor", "model")}
    figure = _beside_the_floor(list(losses), kinds, "Loss against the floor")
    figure.update_traces(texttemplate="%{y:.3f}")
    figure.update_yaxes(title="nats per token (lower is better)")
    return figure


def _beside_the_floor(x: list, losses: Mapping[str, Sequence[float]], title: str) -> go.Figure:
    names = {"floor": "exact floor", "model": "model"}
    figure = go.Figure()
    for kind, values in losses.items():
        figure.add_bar(x=x, y=list(values), name=names[kind], marker_color=COLOURS[kind])
    figure.update_layout(title=title, height=380, barmode="group", **LAYOUT)
    return figure


def frontier(points: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Loss recovered against l0, one mark per dictionary; up and to the left is better.

    Args:
        points: for each `name`, `recipe` (its colour; marks of one recipe are joined), `l0`,
            `loss_recovered`.
    """
    figure = marks_by_recipe(points, "loss_recovered")
    title = "What a code of so many latents recovers of the model's loss"
    figure.update_layout(title=title, height=460, **LAYOUT)
    figure.update_xaxes(title="l0: latents per token (log; fewer is better)", type="log")
    figure.update_yaxes(title="loss recovered (higher is better)")
    return figure


def marks_by_recipe(points: Sequence[Mapping[str, Any]], field: str) -> go.Figure:
    """`field` over l0; marks of one recipe are joined, those of `spalf` are stars."""
    figure = go.Figure()
    for recipe in dict.fromkeys(point["recipe"] for point in points):
        own = sorted((p for p in points if p["recipe"] == recipe), key=lambda p: p["l0"])
        symbol, size = ("star", 16) if recipe == "spalf" else ("circle", 10)
        name = field.replace("_", " ")
        figure.add_scatter(
            x=[p["l0"] for p in own],
            y=[p[field] for p in own],
            text=[p["name"] for p in own],
            name=recipe,
            mode="markers+lines" if len(own) > 1 else "markers",
            marker={"symbol": symbol, "size": size, "color": RECIPE_COLOURS.get(recipe)},
            hovertemplate=f"%{{text}}<br>l0 %{{x:.1f}}<br>{name} %{{y:.4f}}<extra></extra>",
        )
    return figure


def training_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    """Fraction of variance unexplained of each dictionary while it trains, on both log axes."""
    figure = go.Figure()
    for name, history in histories.items():
        figure.add_scatter(
            x=[entry["tokens"] for entry in history],
            y=[entry["fvu"] for entry in history],
            name=name,
            line={"color": RECIPE_COLOURS.get(name.split(" ")[0])},
        )
    figure.update_layout(title="Training, all on one stream", height=420, **LAYOUT)
    figure.update_xaxes(title="tokens (log)", type="log")
    figure.update_yaxes(title="fraction of variance unexplained (log; lower is better)", type="log")
    return figure


def concept_scores(
    scores: Mapping[str, Mapping[str, float]], ceiling: float, title: str
) -> go.Figure:
    """Mean F1 over concepts with the best latent and with five, under a linear probe's."""
    names = sorted(scores, key=lambda name: scores[name]["best"])
    shades = {"five": ("five latents", "#aec7e8"), "best": ("best single latent", "#1f77b4")}
    figure = go.Figure()
    for kind, (label, colour) in shades.items():
        x = [scores[name][kind] for name in names]
        figure.add_bar(y=names, x=x, name=label, orientation="h", marker_color=colour)
    figure.update_traces(texttemplate="%{x:.2f}")
    place = {"annotation_text": "linear probe", "annotation_position": "bottom right"}
    figure.add_vline(x=ceiling, line_dash="dot", **place)
    height = 140 + 34 * len(names)
    figure.update_layout(title=title, height=height, barmode="group", **LAYOUT)
    figure.update_xaxes(title="mean F1 over concepts (higher is better)", range=[0, 1])
    figure.update_legends(traceorder="reversed")
    return figure


def concept_heatmap(scores: Mapping[str, Mapping[str, float]], title: str) -> go.Figure:
    """F1 of every concept (columns) under every method (rows), 0 to 1."""
    methods = list(scores)
    concepts = list(scores[methods[0]])
    values = [[scores[method][concept] for concept in concepts] for method in methods]
    scale = {"zmin": 0, "zmax": 1, "colorscale": "Blues", "colorbar": {"title": "F1"}}
    figure = go.Figure(go.Heatmap(z=values, x=concepts, y=methods, **scale))
    figure.update_layout(title=title, height=160 + 24 * len(methods), **LAYOUT)
    figure.update_xaxes(tickangle=-60, dtick=1)
    figure.update_yaxes(autorange="reversed", dtick=1)
    return figure


def require_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for nothing to draw."""
    if not rows:
        raise ValueError("need at least one row to draw, got none")
