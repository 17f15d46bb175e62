"""Figures (plotly) and coloured text; notebooks show and save them."""

from lib.display.plots import (
    concept_heatmap,
    concept_scores,
    frequencies,
    frontier,
    losses_by_split,
    losses_by_token,
    training_curves,
)
from lib.display.tokens import concept_text, latent_text
from lib.display.training import (
    LiveFigure,
    ablation_bars,
    constraint_curves,
    l0_against_r2,
    l0_r2_curves,
)

__all__ = [
    "LiveFigure",
    "ablation_bars",
    "concept_heatmap",
    "concept_scores",
    "concept_text",
    "constraint_curves",
    "frequencies",
    "frontier",
    "l0_against_r2",
    "l0_r2_curves",
    "latent_text",
    "losses_by_split",
    "losses_by_token",
    "training_curves",
]
