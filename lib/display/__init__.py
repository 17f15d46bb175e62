"""Figures (plotly), coloured text and the feature browser; notebooks show and save them."""

from lib.display.browser.browser import FeatureBrowser
from lib.display.figures.adapters import removal, sparsity_behaviour, weight_concentration
from lib.display.figures.diffing import gap_bars, relative_norms, scaling_plane, token_scores
from lib.display.figures.latents import activation_histogram, dose_curves, logit_table
from lib.display.figures.plots import (
    concept_heatmap,
    concept_scores,
    frequencies,
    frontier,
    losses_by_split,
    losses_by_token,
    training_curves,
)
from lib.display.figures.training import (
    LiveFigure,
    ablation_bars,
    constraint_curves,
    l0_against_r2,
    l0_r2_curves,
)
from lib.display.report import write_report
from lib.display.tokens import colored_tokens, concept_text, latent_text, readable_tokens

__all__ = [
    "FeatureBrowser",
    "LiveFigure",
    "ablation_bars",
    "activation_histogram",
    "colored_tokens",
    "concept_heatmap",
    "concept_scores",
    "concept_text",
    "constraint_curves",
    "dose_curves",
    "frequencies",
    "frontier",
    "gap_bars",
    "l0_against_r2",
    "l0_r2_curves",
    "latent_text",
    "logit_table",
    "losses_by_split",
    "losses_by_token",
    "readable_tokens",
    "relative_norms",
    "removal",
    "scaling_plane",
    "sparsity_behaviour",
    "token_scores",
    "training_curves",
    "weight_concentration",
    "write_report",
]
