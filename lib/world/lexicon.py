"""Words of the world: entries with facts, their forms in two languages, and what each token means.

A rendering is a tuple of `(token, concepts)` pairs, where `concepts` is a bit mask over `CONCEPTS`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

TOPICS = ("mathematics", "cooking", "animals", "weather", "travel", "music", "sports", "family")
STYLES = ("plain", "polite", "curt", "shouting", "quoted", "list")
LANGUAGES = {"en": "english", "fr": "french"}
LEXICAL = (
    "number", "operator", "result", "food", "animal", "place", "colour", "taste", "cooking_method",
    "language_name", "vehicle", "month", "weather_word", "clothing", "instrument", "tool", "sport",
    "relative", "person", "title", "article", "preposition", "pronoun", "verb", "question",
    "negation", "yes_no", "politeness", "plural", "feminine", "quote", "list_marker", "punctuation",
    "upper_case",
)  # fmt: skip
CONCEPTS = (
    *(f"topic:{topic}" for topic in TOPICS),
    *(f"style:{style}" for style in STYLES),
    *(f"language:{language}" for language in LANGUAGES.values()),
    "turn:user",
    "turn:assistant",
    *LEXICAL,
)
BIT = {concept: 1 << i for i, concept in enumerate(CONCEPTS)}
OF_A_CHAT = sum(bit for concept, bit in BIT.items() if concept.startswith(("topic:", "language:")))
"""Topics and languages: concepts that hold for a chat as a whole."""


def concept_matrix(masks: Sequence[int]) -> Bool[np.ndarray, "n n_concepts"]:
    """Bit masks as a table: does token i carry concept j of `CONCEPTS`?"""
    bits = np.arange(len(CONCEPTS), dtype=np.uint64)
    return (np.array(masks, dtype=np.uint64)[:, None] >> bits & np.uint64(1)).astype(bool)


def concept_names(mask: int) -> set[str]:
    """Names of the concepts in a bit mask."""
    return {concept for concept, bit in BIT.items() if mask & bit}


CATEGORY_CONCEPT = {
    "animal": "animal", "feed": "food", "habitat": "place", "food": "food", "staple": "food",
    "dish": "food", "colour": "colour", "taste": "taste", "method": "cooking_method",
    "city": "place", "country": "place", "tongue": "language_name", "sight": "place",
    "vehicle": "vehicle", "month": "month", "sky": "weather_word", "warmth": "weather_word",
    "clothing": "clothing", "instrument": "instrument", "kind": "instrument", "means": "tool",
    "gear": "tool", "sport": "sport", "venue": "place", "relative": "relative",
    "sex": "relative", "person": "person", "title": "title",
}  # fmt: skip
ADJECTIVES = ("colour", "taste", "method")
NAMES = ("city", "country", "tongue", "month", "warmth", "kind", "person", "title")

Rendering = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Entry:
    """One meaning, its words in both languages and the facts of the world about it."""

    name: str
    category: str
    en: tuple[str, ...]
    """Noun: singular, plural (`-` where it has none). Adjective and name: the one word."""
    fr: tuple[str, ...]
    """Noun: singular, plural. Adjective: masculine, feminine, and their plurals."""
    feminine: bool
    facts: dict

    def counts(self, language: str) -> tuple[bool, bool]:
        """Whether the noun has a singular and a plural (`milk` has only one, `boots` the other)."""
        words = self.en if language == "en" else self.fr
        return words[0] != "-", words[1] != "-"


def load_lexicon(folder: Path) -> dict[str, dict[str, Entry]]:
    """Category → name → entry, from `lexicon.json`."""
    raw = json.loads((folder / "lexicon.json").read_text(encoding="utf-8"))
    lexicon: dict[str, dict[str, Entry]] = {}
    for category, entries in raw.items():
        lexicon[category] = {}
        for name, facts in entries.items():
            en, fr = facts.pop("en").split(), facts.pop("fr").split()
            named = (*ADJECTIVES, *NAMES)
            gendered = category not in named or category in ("country", "person")
            gender = fr.pop() if gendered else "m"
            if gender not in ("m", "f"):
                raise ValueError(f"lexicon.json: {category} {name}: need a gender m or f, got {fr}")
            lexicon[category][name] = Entry(
                name, category, tuple(en), tuple(fr), gender == "f", facts
            )
    return lexicon


def begins_with_vowel(word: str, entry: Entry | None = None) -> bool:
    """Whether French elides before `word` (a mute h counts, an aspirated one does not)."""
    if entry is not None and entry.facts.get("h") == "aspirated":
        return False
    return word[0] in "aeiouéèêœâàîh"


class Forms:
    """Renders an entry or a number in a form and a language, with each token's lexical concepts."""

    def __init__(self, words: dict[str, dict[str, str]]) -> None:
        self.words: dict[str, dict[str, int]] = {"en": {}, "fr": {}}
        for language, by_concept in words.items():
            for concept, tokens in by_concept.items():
                for token in tokens.split():
                    masks = self.words[language]
                    masks[token] = masks.get(token, 0) | BIT[concept]

    def literal(self, text: str, language: str) -> Rendering:
        return tuple((token, self.words[language].get(token, 0)) for token in text.split())

    def __call__(self, value, form: str, language: str, argument=None, result=False) -> Rendering:
        """`argument`: the count for `count`, the noun to agree with for `sg_as`, `pl_as`."""
        if isinstance(value, int):
            return ((str(value), BIT["number"] | (BIT["result"] if result else 0)),)
        if form == "count":
            one = argument == 1 or (language == "fr" and argument < 2)
            form = "sg" if one else "pl"
        if value.category in ADJECTIVES:
            return self._adjective(value, form, language, argument)
        render = self._english if language == "en" else self._french
        return render(value, form)

    def _mask(self, entry: Entry, language: str, plural: bool) -> int:
        mask = BIT[CATEGORY_CONCEPT[entry.category]] | (BIT["plural"] if plural else 0)
        return mask | (BIT["feminine"] if language == "fr" and entry.feminine else 0)

    def _adjective(self, entry: Entry, form: str, language: str, noun: Entry | None) -> Rendering:
        mask = BIT[CATEGORY_CONCEPT[entry.category]]
        if language == "en":
            return ((entry.en[0], mask),)
        feminine = noun is not None and noun.feminine
        plural = form == "pl_as"
        mask |= (BIT["feminine"] if feminine else 0) | (BIT["plural"] if plural else 0)
        return ((entry.fr[feminine + 2 * plural], mask),)

    def _is_plural(self, entry: Entry, form: str, language: str) -> bool:
        singular, plural = entry.counts(language)
        if not (singular and plural):
            return plural
        return form in ("pl", "the_pl", "some_pl", "some")

    def _english(self, entry: Entry, form: str) -> Rendering:
        if form == "it":
            human = entry.category in ("person", "relative")
            return self.literal(("she" if entry.feminine else "he") if human else "it", "en")
        if entry.category in NAMES:
            noun = (entry.en[0], self._mask(entry, "en", False))
            return (*self.literal("in", "en"), noun) if form == "in" else (noun,)
        plural = self._is_plural(entry, form, "en")
        word = entry.en[plural]
        noun = (word, self._mask(entry, "en", plural))
        if form in ("the", "the_pl"):
            return (*self.literal("the", "en"), noun)
        if form == "in":
            on = "en" in entry.facts.get("on", "")
            return (*self.literal("on the" if on else "in the", "en"), noun)
        if form == "a" and not plural:
            return (*self.literal("an" if word[0] in "aeiou" else "a", "en"), noun)
        return (*self.literal("my", "en"), noun) if form == "my" else (noun,)

    def _french(self, entry: Entry, form: str) -> Rendering:
        if form in ("it", "they"):
            pronoun = "elle" if entry.feminine else "il"
            return self.literal(pronoun if form == "it" else f"{pronoun}s", "fr")
        if entry.category in NAMES:
            noun = (entry.fr[0], self._mask(entry, "fr", False))
            if form != "in":
                return (noun,)
            en = entry.feminine or begins_with_vowel(entry.fr[0])
            return (*self.literal("en" if en else "au", "fr"), noun)
        plural = self._is_plural(entry, form, "fr")
        word = entry.fr[plural]
        noun = (word, self._mask(entry, "fr", plural))
        determiner = self._determiner(entry, form, plural, begins_with_vowel(word, entry))
        return (*self.literal(determiner, "fr"), noun)

    def _determiner(self, entry: Entry, form: str, plural: bool, vowel: bool) -> str:
        definite = "les" if plural else "l'" if vowel else "la" if entry.feminine else "le"
        indefinite = "des" if plural else "une" if entry.feminine else "un"
        if form in ("the", "the_pl"):
            return definite
        if form == "a":
            return indefinite
        if form in ("some", "some_pl", "of"):
            return {"les": "des", "le": "du"}.get(definite, f"de {definite}")
        if form == "in":
            return f"sur {definite}" if "fr" in entry.facts.get("on", "") else f"dans {definite}"
        if form == "my":
            return "ma" if entry.feminine and not vowel else "mon"
        return ""
