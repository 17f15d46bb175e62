"""Sparse dictionaries: one module, every rule, one training loop."""

from lib.dictionaries import recipes
from lib.dictionaries.config import DictionaryConfig, FitConfig
from lib.dictionaries.dictionary import Dictionary, load_dictionaries
from lib.dictionaries.fit import Fitted, fit
from lib.dictionaries.recipes import Recipe
from lib.sparse import SparseActs

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
