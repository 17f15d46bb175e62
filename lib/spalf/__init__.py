"""SPALF: the sparsest dictionary that explains a given share of the variance."""

from lib.spalf.config import ABLATIONS, SpalfConfig
from lib.spalf.fit import SpalfFit, train_spalf
from lib.spalf.stratified import Anchors

__all__ = ["ABLATIONS", "Anchors", "SpalfConfig", "SpalfFit", "train_spalf"]
