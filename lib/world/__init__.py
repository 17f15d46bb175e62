"""A tiny language with known concepts, exact probabilities and planted behaviours."""

from lib.world.behaviours import BEHAVIOURS, PREFERENCES, Behaviour, Rewriter
from lib.world.lexicon import CONCEPTS, OF_A_CHAT, concept_matrix, concept_names
from lib.world.parser import Grade, Reader
from lib.world.vocabulary import build_tokenizer
from lib.world.world import Exchange, World

__all__ = [
    "BEHAVIOURS",
    "CONCEPTS",
    "OF_A_CHAT",
    "PREFERENCES",
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
