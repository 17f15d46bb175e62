"""A tiny language with known concepts, exact probabilities and planted behaviours."""

from lib.data.world.behaviours import BEHAVIOURS, Behaviour, Rewriter
from lib.data.world.lexicon import CONCEPTS, concept_matrix, concept_names
from lib.data.world.reading import Grade, Reader
from lib.data.world.vocabulary import build_tokenizer
from lib.data.world.world import Exchange, World

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
