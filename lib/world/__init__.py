"""A tiny language with known concepts, exact probabilities and planted behaviours."""

from lib.world.behaviours import BEHAVIOURS, Behaviour, Rewriter
from lib.world.lexicon import CONCEPTS, concept_matrix, concept_names
from lib.world.parser import Grade, Reader
from lib.world.vocabulary import build_tokenizer
from lib.world.world import Exchange, World

__all__ = [
    "BEHAVIOURS",
    "CONCEPTS",
    "Behaviour",
    "Exchange",
    "Grade",
    "Reader",
    "Rewriter",
    "World",
    "build_tokenizer",
    "concept_matrix",
    "concept_names",
]
