"""How a constrained training went, and what it gives beside the recipes that are swept."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from IPython.display import display
from plotly.subplots import make_subplots

from lib.display.figures.plots import LAYOUT, RECIPE_COLOURS, marks_by_recipe, require_rows

CONSTRAINT_COLOURS = {
    "faithfulness": "#1f77b4", "drift": "#ff7f0e", "orthogonality": "#2ca02c", "kl": "#d62728",
}  # fmt: skip
"""A constraint keeps its colour in every notebook."""

BAND = 0.01
"""How far from its target r2 may end."""

_LINEAR = 0.02  # violations below this are drawn on a linear scale, larger on a logarithmic one
_TICKS = (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0)
_LAMBDAS = (0, 1, 3, 10, 30, 100)  # ticks of multipliers, drawn as log(1 + λ)
_PHASES = {"phase 1": "rgba(31, 119, 180, 0.06)", "phase 2": "rgba(255, 127, 14, 0.10)"}


class LiveFigure:
    """A figure in a notebook that later ones replace, where it stands.

    Updates leave one output behind, the last, also when papermill runs the notebook.
    """

    def __init__(self) -> None:
        self._handle = display({"text/plain": "…"}, raw=True, display_id=True)

    def show(self, figure: go.Figure) -> None:
        # the mime bundle: what plotly itself displays has no id to replace it by
        bundle = {"application/vnd.plotly.v1+json": json.loads(figure.to_json())}
        self._handle.update(bundle, raw=True)


def constraint_curves(
    history: Sequence[Mapping[str, Any]], phase_2_at: int | None, title: str
) -> go.Figure:
    """Violations, multipliers and penalties of every constraint, over steps.

    Violations have a scale that is linear within ±0.02 and logarithmic beyond, multipliers one of
    log(1 + λ). A constraint is drawn from the first entry that has it.

    Args:
        history: for each entry `step`, and `violations`, `multipliers` and `penalties` by name.
        phase_2_at: step at which phase 2 began, None where it never did.

    Raises:
        ValueError: no entries.
    """
    require_rows(history)
    heights = {"row_heights": [0.44, 0.28, 0.28], "vertical_spacing": 0.05}
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, **heights)
    names = dict.fromkeys(name for entry in history for name in entry["violations"])
    panels = {"violations": _squeeze, "multipliers": math.log1p, "penalties": float}
    for row, (field, draw) in enumerate(panels.items(), start=1):
        for name in names:
            own = [entry for entry in history if name in entry[field]]
            values = [entry[field][name] for entry in own]
            figure.add_scatter(
                x=[entry["step"] for entry in own],
                y=[draw(value) for value in values],
                customdata=values,
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                line={"color": CONSTRAINT_COLOURS.get(name)},
                hovertemplate=f"{name}<br>step %{{x}}<br>%{{customdata:.4g}}<extra></extra>",
                row=row,
                col=1,
            )
    _mark_phases(figure, [entry["step"] for entry in history], phase_2_at)
    figure.add_hline(y=0, line_width=1, row=1, col=1)
    figure.update_layout(title=title, height=700, **LAYOUT)
    figure.update_layout(legend_title="above 0: violated", margin_t=70)
    figure.update_yaxes(title="violation g", row=1, col=1, zeroline=False, **_symmetric(figure))
    ticks = {"tickvals": [math.log1p(t) for t in _LAMBDAS], "ticktext": [f"{t}" for t in _LAMBDAS]}
    figure.update_yaxes(title="multiplier λ", rangemode="tozero", row=2, col=1, **ticks)
    figure.update_yaxes(title="penalty ρ (log)", type="log", dtick=1, row=3, col=1)
    figure.update_xaxes(title="step", row=3, col=1)
    return figure


def l0_r2_curves(
    history: Sequence[Mapping[str, Any]], r2_target: float, phase_2_at: int | None
) -> go.Figure:
    """l0 and r2 over tokens, with the band that r2 should end in.

    The axis of r2 shows at least the last half of the entries; what comes before may leave it.

    Args:
        history: for each entry `step`, `tokens`, `l0`, `r2`.
        phase_2_at: step at which phase 2 began, None where it never did.

    Raises:
        ValueError: no entries.
    """
    require_rows(history)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    tokens = [entry["tokens"] for entry in history]
    for row, field in enumerate(("l0", "r2"), start=1):
        values = [entry[field] for entry in history]
        line = {"color": RECIPE_COLOURS["spalf"]}
        figure.add_scatter(x=tokens, y=values, name=field, line=line, row=row, col=1)
    later = [e["tokens"] for e in history if phase_2_at is not None and e["step"] >= phase_2_at]
    _mark_phases(figure, tokens, later[0] if later else None)
    low, high = r2_target - BAND, r2_target + BAND
    figure.add_hrect(y0=low, y1=high, fillcolor="#2ca02c", opacity=0.25, line_width=0, row=2, col=1)
    label = {"annotation_text": f"target {r2_target:g} ± {BAND:g}"}
    label |= {"annotation_position": "top left", "line_dash": "dot", "line_width": 1}
    figure.add_hline(y=r2_target, row=2, col=1, **label)
    shown = [entry["r2"] for entry in history][len(history) // 2 :]
    least, most = min(*shown, r2_target - 0.1), max(*shown, r2_target + 0.03)
    figure.update_layout(title="Latents and variance", height=520, showlegend=False, **LAYOUT)
    figure.update_layout(margin_t=70)
    figure.update_yaxes(title="l0: latents per token<br>(log; fewer is better)", row=1, col=1)
    figure.update_yaxes(**_log_axis([entry["l0"] for entry in history]), row=1, col=1)
    figure.update_yaxes(title="r2 (higher is better)", range=[least, most], row=2, col=1)
    figure.update_xaxes(title="tokens", row=2, col=1)
    return figure


def l0_against_r2(points: Sequence[Mapping[str, Any]], r2_target: float | None = None) -> go.Figure:
    """Variance that is left against l0, one mark per dictionary; down and to the left is better.

    Args:
        points: for each `name`, `recipe` (its colour; marks of one recipe are joined, those of
            `spalf` are stars), `l0`, `r2`.
        r2_target: drawn as a dotted line.
    """
    left = [{**point, "1 - r2": 1 - point["r2"]} for point in points]
    figure = marks_by_recipe(left, "1 - r2")
    if r2_target is not None:
        figure.add_hline(y=1 - r2_target, line_dash="dot", line_width=1)
        place = {"x": 1, "xref": "x domain", "xanchor": "right", "yanchor": "bottom"}
        label = f"r2 target {r2_target:g}"
        figure.add_annotation(text=label, y=math.log10(1 - r2_target), showarrow=False, **place)
    title = "What a code of so many latents leaves unexplained"
    figure.update_layout(title=title, height=460, **LAYOUT)
    figure.update_xaxes(title="l0: latents per token (log; fewer is better)")
    figure.update_xaxes(**_log_axis([p["l0"] for p in points]))
    figure.update_yaxes(title="1 - r2 (log; lower is better)")
    figure.update_yaxes(**_log_axis([point["1 - r2"] for point in left]))
    return figure


def ablation_bars(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """l0 of each ablation, with the r2 that it comes with; the first row's is a dotted line.

    Args:
        rows: for each `name`, `l0`, `r2`; the full method first.

    Raises:
        ValueError: no rows.
    """
    require_rows(rows)
    full, *_ = rows
    colours = [RECIPE_COLOURS["spalf"], *["#d0d4d9"] * (len(rows) - 1)]
    bars = go.Bar(
        y=[row["name"] for row in rows],
        x=[row["l0"] for row in rows],
        text=[f"l0 {row['l0']:.1f}, r2 {row['r2']:.3f}" for row in rows],
        textposition="inside",
        insidetextanchor="start",
        constraintext="none",
        orientation="h",
        marker_color=colours,
    )
    figure = go.Figure(bars)
    place = {"annotation_text": full["name"], "annotation_position": "top"}
    figure.add_vline(x=full["l0"], line_dash="dot", **place)
    height = 140 + 34 * len(rows)
    figure.update_layout(title="Without one component each", height=height, **LAYOUT)
    figure.update_xaxes(title="l0: latents per token (fewer is better at equal r2)")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A few ticks of each power of ten that these values come near, or, where they lie close
    together, evenly spaced ones; written out."""
    known = [value for value in values if value > 0] or [1.0]
    low, high = min(known), max(known)
    if low < high < 4 * low:
        size = 10.0 ** math.floor(math.log10((high - low) / 3))
        step = next(size * digit for digit in (1, 2, 5, 10) if (high - low) / (size * digit) <= 5)
        ticks = [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
        return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}
    logs = [math.log10(value) for value in known]
    powers = range(math.floor(min(logs)), math.ceil(max(logs)) + 1)
    digits = (1, 2, 5) if max(logs) - min(logs) > 1.5 else (1, 2, 3, 5, 7)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _squeeze(g: float) -> float:
    return math.asinh(g / _LINEAR)


def _symmetric(figure: go.Figure) -> dict[str, Any]:
    """Ticks and range of the violations' axis: as far below 0 as above."""
    drawn = [abs(y) for trace in figure.data if trace.yaxis == "y" for y in trace.y]
    top = 1.05 * max((y for y in drawn if math.isfinite(y)), default=0) or 1.0
    ticks = [tick for tick in _TICKS if _squeeze(tick) <= top]
    ticks = sorted({*ticks, *(-tick for tick in ticks)})
    places = [_squeeze(tick) for tick in ticks]
    return {"range": [-top, top], "tickvals": places, "ticktext": [f"{t:g}" for t in ticks]}


def _mark_phases(figure: go.Figure, xs: Sequence[int], boundary: int | None) -> None:
    """Shaded areas in every panel, named in the first, and a line between them."""
    ends = [xs[0], xs[-1]] if boundary is None else [xs[0], boundary, xs[-1]]
    spans = zip(_PHASES.items(), ends, ends[1:], strict=False)
    for (name, colour), start, end in spans:
        figure.add_vrect(x0=start, x1=end, fillcolor=colour, line_width=0, layer="below")
        place = {"x": (start + end) / 2, "y": 1, "xref": "x", "yref": "y domain"}
        figure.add_annotation(text=name, showarrow=False, yanchor="bottom", **place)
    if boundary is not None:
        figure.add_vline(x=boundary, line_dash="dash", line_width=1)
