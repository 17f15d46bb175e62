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
TICKS = [digit * 10**power for power in range(-1, 6) for digit in (1, 2, 5)]
LOG = {"type": "log", "tickvals": TICKS, "tickformat": ","}


def training_speed(found: Mapping[str, Any]) -> go.Figure:
    """ms a step of each library and setup beside the floor, above how time and memory grow.

    Args:
        found: what `figures/bench.json` holds. Of `setups` it reads `name`, `floor["ms"]` and of
            each of `libraries` its `ms` (absent where it failed); of `growth` (empty: not drawn)
            for `d_sae` and `k` points of `value`, `ms` and `peak_mb`.
    """
    rows, setups = 1 + bool(found["growth"]), found["setups"]
    specs = [[{"colspan": 2}, None], [{"secondary_y": True}] * 2]
    figure = make_subplots(rows=rows, cols=2, specs=specs[:rows])
    names = [setup["name"] for setup in setups]
    for library in dict.fromkeys(name for setup in setups for name in setup["libraries"]):
        taken = [setup["libraries"].get(library, {}).get("ms") for setup in setups]
        text = ["" if ms is None else f"{ms:.0f}" for ms in taken]
        colour = LIBRARY_COLOURS.get(library)
        figure.add_bar(
            x=names, y=taken, name=library, text=text, marker_color=colour, row=1, col=1
        )  # fmt: skip
    line = {"width": 3, "color": COLOURS["floor"]}
    marker, ms = {"symbol": "line-ew", "size": 68, "line": line}, [s["floor"]["ms"] for s in setups]
    figure.add_scatter(x=names, y=ms, name="floor", mode="markers", marker=marker, row=1, col=1)
    figure.update_yaxes(title="ms a step (log; lower is better)", **LOG, row=1, col=1)
    for column, (axis, points) in enumerate(found["growth"].items(), start=1):
        _growth(figure, points, axis, column)
    machine = found["machine"]
    title = f"A training step on {machine['gpu'] or machine['cpu']}, threads: {machine['threads']}"
    figure.update_layout(title=title, barmode="group", height=440 * rows, **LAYOUT)
    return figure


def _growth(figure: go.Figure, points: Sequence[Mapping[str, Any]], axis: str, column: int) -> None:
    values, place = [point["value"] for point in points], {"row": 2, "col": column}
    for key, name, colour, dash in (
        ("ms", "ms a step", LIBRARY_COLOURS["lib"], "solid"),
        ("peak_mb", "peak MB", "#d62728", "dot"),
    ):
        y = [point.get(key) for point in points]
        seen, line = [number for number in y if number], {"color": colour, "dash": dash}
        style = {"mode": "lines+markers", "line": line, "showlegend": column == 1}
        place["secondary_y"] = key == "peak_mb"
        figure.add_scatter(x=values, y=y, name=f"lib: {name}", **style, **place)
        figure.update_yaxes(
            title=f"{name} (log; lower is better)", showgrid=key == "ms", **LOG, **place,
            range=[math.log10(min(seen) / 2), math.log10(max(seen) * 2)] if seen else None,
        )  # fmt: skip
    label = {"d_sae": "d_sae: latents (log)", "k": "k: latents a token (log)"}[axis]
    ticks = {"tickvals": values, "ticktext": [str(value) for value in values]}
    figure.update_xaxes(type="log", title=label, **ticks, row=2, col=column)
