"""Plotly figures of how two models differ, latent by latent and method by method."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from jaxtyping import Bool, Float
from torch import Tensor

from lib.analysis.diffing.sites import SiteReading
from lib.display.figures.latents import shown
from lib.display.figures.plots import COLOURS, LAYOUT, require_rows

DIFFING_COLOURS = {
    "crosscoder": "#2ca02c", "crosscoder, latent scaling": "#2ca02c",
    "delta": "#17becf", "crosscoder with Δ-loss, latent scaling": "#17becf",
    "dfc": "#9467bd", "DFC, latent scaling": "#9467bd",
    "KL per token": "#1f77b4", "logit-difference topics": "#aec7e8",
    "PCA of the difference": "#d62728", "activation difference lens": "#ff9896",
    "SAE of the difference": "#ff7f0e", "stage-wise SAE": "#bcbd22", "Δ-attribution": "#8c564b",
}  # fmt: skip
"""A method keeps its colour in every figure."""


def relative_norms(readings: Mapping[str, SiteReading], min_firings: int = 20) -> go.Figure:
    """Histograms of relative decoder norms: 0 is only a, 1 only b; dead latents are left out.

    Raises:
        ValueError: no readings.
    """
    require_rows([{"name": name} for name in readings])
    figure = go.Figure()
    for name, reading in readings.items():
        alive = reading.n_firings >= min_firings
        figure.add_histogram(
            x=reading.relative_norm[alive].tolist(),
            name=name,
            xbins={"start": 0, "end": 1.0001, "size": 0.02},
            marker_color=DIFFING_COLOURS.get(name),
            opacity=0.6,
        )
    title = "Which model's decoder is longer?"
    figure.update_layout(title=title, height=380, barmode="overlay", **LAYOUT)
    figure.update_xaxes(title="relative norm: 0 only a, 0.5 alike, 1 only b", range=[0, 1.01])
    figure.update_yaxes(title="latents (log)", type="log")
    return figure


def scaling_plane(
    reading: SiteReading,
    labels: Mapping[int, str],
    right: Bool[Tensor, "d_sae"] | None = None,
    *,
    min_firings: int = 20,
) -> go.Figure:
    """Latent scaling as one of b: how much of a latent does a's error, and reconstruction, hold?

    Latents at the lower left, in the box, are what b has and a has not.

    Args:
        labels: names of latents.
        right: latents that are known to be a planted difference's.
    """
    alive = (reading.n_firings >= min_firings).nonzero()[:, 0].tolist()
    groups = {"latents": [j for j in alive if right is None or not right[j]]}
    if right is not None:
        groups["on planted tokens"] = [j for j in alive if right[j]]
    colours = {"latents": COLOURS["floor"], "on planted tokens": "#d62728"}
    figure = go.Figure()
    for name, chosen in groups.items():
        figure.add_scattergl(
            x=reading.error[1][chosen].clamp(-1, 2).tolist(),
            y=reading.reconstruction[1][chosen].clamp(-1, 2).tolist(),
            text=[shown(f"{j}: {labels.get(j, '')}") for j in chosen],
            name=name,
            mode="markers",
            marker={"size": 6, "color": colours[name], "opacity": 0.75},
            hovertemplate="%{text}<br>error %{x:.2f}<br>reconstruction %{y:.2f}<extra></extra>",
        )
    box = {"x0": -1.05, "x1": 0.2, "y0": -1.05, "y1": 0.5}  # as `SiteReading.lacks`
    figure.add_shape(type="rect", **box, line={"dash": "dot", "width": 1})
    figure.update_layout(title="Latent scaling, of b in a", height=460, **LAYOUT)
    figure.update_xaxes(title="in a's error (0: a does not have it, 1: as much as b)")
    figure.update_yaxes(title="in a's reconstruction")
    return figure


def gap_bars(
    closed: Mapping[str, Mapping[str, float]], behaviours: Sequence[str], title: str
) -> go.Figure:
    """Share of the KL gap that each method closes, a group of bars for each behaviour."""
    require_rows([{"name": name} for name in closed])
    figure = go.Figure()
    for method, shares in closed.items():
        x = [*behaviours, "random"]
        figure.add_bar(x=x, y=[shares.get(name) for name in x], name=method)
        figure.data[-1].marker.color = DIFFING_COLOURS.get(method)
    figure.add_hline(y=1, line_dash="dot", annotation_text="all of the difference")
    figure.update_layout(title=title, height=420, barmode="group", **LAYOUT)
    figure.update_yaxes(title="share of the KL gap closed (higher is better)")
    return figure


def token_scores(
    scores: Mapping[str, Float[Tensor, " n"]], planted: Bool[Tensor, " n"], n_points: int = 200
) -> go.Figure:
    """How many of the planted tokens are among those of highest score, method by method."""
    require_rows([{"name": name} for name in scores])
    figure, total, n = go.Figure(), int(planted.sum()), len(planted)
    places = [round(n * (i / n_points) ** 2) for i in range(1, n_points + 1)]
    for name, values in scores.items():
        found = planted[values.argsort(descending=True, stable=True)].cumsum(0)
        y = [found[max(place, 1) - 1].item() / total for place in places]
        line = {"color": DIFFING_COLOURS.get(name)}
        figure.add_scatter(x=[place / n for place in places], y=y, name=name, line=line)
    figure.add_scatter(
        x=[0, total / n, 1],
        y=[0, 1, 1],
        name="best possible",
        line={"dash": "dot", "color": "#999"},
    )
    figure.update_layout(title="Where do the models differ?", height=420, **LAYOUT)
    figure.update_xaxes(title="share of all tokens looked at, highest score first", range=[0, 0.5])
    figure.update_yaxes(title="share of the planted tokens among them")
    return figure
