"""The training benchmark as a figure: libraries side by side, and how cost grows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lib.display.figures.plots import COLOURS, LAYOUT

LIBRARY_COLOURS = {
    "lib": "#000000", "lib, float32": "#7f7f7f", "sparsify": "#1f77b4", "sae-lens": "#2ca02c",
    "dictionary-learning": "#ff7f0e", "overcomplete": "#9467bd",
}  # fmt: skip
MEMORY_COLOUR = "#d62728"
_TICKS = [digit * 10**power for power in range(-1, 6) for digit in (1, 2, 5)]


def training_speed(found: Mapping[str, Any]) -> go.Figure:
    """ms a step of each library and setup beside the floor, above how time and memory grow.

    Args:
        found: what `figures/bench.json` holds. Of `setups` it reads `name`, `floor["ms"]` and of
            each of `libraries` its `ms` (absent where it failed); of `growth` (empty: not drawn)
            for `d_sae` and `k` points of `value`, `ms` and `peak_mb`.
    """
    axes = [axis for axis in ("d_sae", "k") if found["growth"].get(axis)]
    specs = [[{"colspan": 2}, None], [{"secondary_y": True}, {"secondary_y": True}]]
    figure = make_subplots(rows=1 + bool(axes), cols=2, specs=specs[: 1 + bool(axes)])
    _race(figure, found["setups"])
    for column, axis in enumerate(axes, start=1):
        _growth(figure, found["growth"][axis], axis, column)
    machine = found["machine"]
    title = f"A training step on {machine['gpu'] or machine['cpu']}, threads: {machine['threads']}"
    figure.update_layout(title=title, barmode="group", height=900 if axes else 460, **LAYOUT)
    return figure


def _race(figure: go.Figure, setups: Sequence[Mapping[str, Any]]) -> None:
    names = [setup["name"] for setup in setups]
    for library in dict.fromkeys(name for setup in setups for name in setup["libraries"]):
        taken = [setup["libraries"].get(library, {}).get("ms") for setup in setups]
        bars = go.Bar(
            x=names,
            y=taken,
            name=library,
            text=[f"{ms:.0f}" if ms is not None else "" for ms in taken],
            marker_color=LIBRARY_COLOURS.get(library),
        )
        figure.add_trace(bars, row=1, col=1)
    floor = go.Scatter(
        x=names,
        y=[setup["floor"]["ms"] for setup in setups],
        name="floor",
        mode="markers",
        marker={"symbol": "line-ew", "size": 68, "line": {"width": 3, "color": COLOURS["floor"]}},
    )
    figure.add_trace(floor, row=1, col=1)
    title = "ms a step (log; lower is better)"
    figure.update_yaxes(type="log", title=title, tickvals=_TICKS, tickformat=",", row=1, col=1)


def _growth(figure: go.Figure, points: Sequence[Mapping[str, Any]], axis: str, column: int) -> None:
    for key, name, colour in (
        ("ms", "lib: ms a step", LIBRARY_COLOURS["lib"]),
        ("peak_mb", "lib: peak MB", MEMORY_COLOUR),
    ):
        line = go.Scatter(
            x=[point["value"] for point in points],
            y=[point.get(key) for point in points],
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": "solid" if key == "ms" else "dot"},
            showlegend=column == 1,
        )
        figure.add_trace(line, row=2, col=column, secondary_y=key == "peak_mb")
    values = [point["value"] for point in points]
    label = {"d_sae": "d_sae: latents (log)", "k": "k: latents a token (log)"}[axis]
    figure.update_xaxes(
        type="log", title=label, tickvals=values, ticktext=[str(v) for v in values],
        row=2, col=column,
    )  # fmt: skip
    for key, title in (("ms", "ms a step"), ("peak_mb", "peak MB")):
        seen = [point[key] for point in points if point.get(key)]
        figure.update_yaxes(
            type="log", title=f"{title} (log; lower is better)", tickvals=_TICKS, tickformat=",",
            range=[math.log10(min(seen) / 2), math.log10(max(seen) * 2)] if seen else None,
            showgrid=key == "ms", row=2, col=column, secondary_y=key == "peak_mb",
        )  # fmt: skip
