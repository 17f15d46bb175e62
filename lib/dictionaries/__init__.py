"""Sparse dictionaries: one module, every rule, one training loop."""

from lib.dictionaries import recipes
from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.fit_config import FitConfig
from lib.dictionaries.kernels import SparseActs
from lib.dictionaries.recipes import Recipe
from lib.dictionaries.store import load_dictionaries
from lib.dictionaries.train import Fitted, fit

__all__ = [
    "Dictionary",
    "DictionaryConfig",
    "FitConfig",
    "Fitted",
    "Recipe",
    "SparseActs",
    "fit",
    "load_dictionaries",
    "recipes",
]
