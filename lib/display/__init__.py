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

__all__ = [
    "concept_heatmap",
    "concept_scores",
    "concept_text",
    "frequencies",
    "frontier",
    "latent_text",
    "losses_by_split",
    "losses_by_token",
    "training_curves",
]
