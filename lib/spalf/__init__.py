"""SPALF: the sparsest dictionary that explains a given share of the variance."""

from lib.spalf.config import ABLATIONS, SpalfConfig
from lib.spalf.stratified import Anchors
from lib.spalf.train import SpalfFit, train_spalf

__all__ = ["ABLATIONS", "Anchors", "SpalfConfig", "SpalfFit", "train_spalf"]
