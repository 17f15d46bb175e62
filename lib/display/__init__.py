"""Figures (plotly) and coloured text; notebooks show and save them."""

from lib.display.plots import frequencies, losses_by_split, losses_by_token
from lib.display.tokens import concept_text

__all__ = ["concept_text", "frequencies", "losses_by_split", "losses_by_token"]
