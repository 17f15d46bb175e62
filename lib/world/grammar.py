"""Templates of the world, compiled: what an intent may ask, and what the answer is.

A template is words and slots, `{prefix+variable.form:argument}`. Variables come in independent
groups; a group is uniform over a list of tuples, so every probability is a ratio of counts.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lib.world.lexicon import BIT, Entry, Forms, Rendering, begins_with_vowel, load_lexicon

SLOT = re.compile(r"^\{(?:(\w+)\+)?(\w+)(?:\.(\w+))?(?::(\w+))?\}$")
Bindings = dict[str, Entry | int]


@dataclass(eq=False)
class Slot:
    """A place in a template that a variable fills; renderings are kept, they recur."""

    variable: str
    form: str
    argument: str | None
    prefix: str | None
    language: str
    upper: bool
    result: bool
    forms: Forms
    cache: dict = field(default_factory=dict)

    def __call__(self, bindings: Bindings) -> Rendering:
        value = bindings[self.variable]
        argument = bindings[self.argument] if self.argument else None
        key = value if argument is None else (value, argument)
        rendering = self.cache.get(key)
        if rendering is None:
            rendering = self.forms(value, self.form, self.language, argument, self.result)
            rendering = self._prefixed(rendering, value)
            self.cache[key] = rendering = shout(rendering) if self.upper else rendering
        return rendering

    def _prefixed(self, rendering: Rendering, value: Entry | int) -> Rendering:
        if self.prefix is None:
            return rendering
        entry = value if rendering[0][0] in getattr(value, "fr", ()) else None
        vowel = begins_with_vowel(rendering[0][0], entry)
        word = self.prefix[:-1] + "'" if vowel else self.prefix
        return self.forms.literal(word, self.language) + rendering


Element = tuple[str, int] | Slot


def shout(rendering: Rendering) -> Rendering:
    """Upper case; tokens that have one gain the concept `upper_case`."""
    return tuple(
        (token.upper(), mask | BIT["upper_case"]) if token.upper() != token else (token, mask)
        for token, mask in rendering
    )


def render(elements: list[Element], bindings: Bindings) -> tuple[list[str], list[int]]:
    """Tokens and lexical concepts of a compiled template."""
    pairs: list[tuple[str, int]] = []
    for element in elements:
        if type(element) is Slot:
            pairs += element(bindings)
        else:
            pairs.append(element)
    return [token for token, _ in pairs], [mask for _, mask in pairs]


@dataclass(eq=False)
class Intent:
    """One thing that can be asked about a topic, in both languages."""

    topic: str
    name: str
    groups: list[tuple[tuple[str, ...], list[tuple]]]
    """(variables, tuples of values they may take together), independent of each other."""
    let: dict[str, list[str]]
    case: list[str] | None
    result: str | None
    weight: float
    """How often it is asked, next to the topic's other intents."""
    texts: dict

    def say(self, language: str, bindings: Bindings) -> dict:
        """The answer's templates `full`, `key`, `items` that are true under `bindings`."""
        text = self.texts[language]
        return text if self.case is None else text["yes" if bindings["case"] else "no"]


class Grammar:
    """Everything in `data/world`, loaded and compiled."""

    def __init__(self, folder: Path) -> None:
        raw = json.loads((folder / "grammar.json").read_text(encoding="utf-8"))
        self.facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.lexicon = load_lexicon(folder)
        self.forms = Forms(raw["words"])
        self.raw = raw
        self.intents = [
            Intent(
                item["topic"],
                item["name"],
                [(tuple(k.split(",")), self._domain(v)) for k, v in item["vars"].items()],
                {name: call.split() for name, call in item.get("let", {}).items()},
                item["case"].split() if "case" in item else None,
                item.get("result"),
                item.get("weight", 1),
                {language: item[language] for language in ("en", "fr")},
            )
            for item in raw["intents"]
        ]

    def _domain(self, name: str) -> list[tuple]:
        digits = range(1, 10)
        numbers = {
            "sums": [(a, b) for a in digits for b in digits],
            "differences": [(a, b) for a in digits for b in digits if b <= a],
            "unequal": [(a, b) for a in range(10) for b in range(10) if a != b],
            "scores": [(a, b) for a in range(2, 10) for b in range(2, 10) if a != b],
            "digit": [(a,) for a in range(2, 10)],
        }
        if name in numbers:
            return numbers[name]
        if name == "relations":
            relative = self.lexicon["relative"]
            table = self.facts["relation"]
            return [(relative[x], relative[y]) for x in table for y in table[x]]
        if name == "kin pair":
            people, relatives = self.lexicon["person"], self.lexicon["relative"]
            kin = itertools.product(people.values(), relatives.values())
            pairs = itertools.permutations([k for k in kin if k[0].feminine == k[1].feminine], 2)
            return [(u, x, v, y) for (u, x), (v, y) in pairs if u is not v and x is not y]
        category, *rest = name.split()
        entries = list(self.lexicon[category].values())
        if rest == ["pair"]:
            return list(itertools.permutations(entries, 2))
        if rest:
            entries = [entry for entry in entries if rest[1] in entry.facts]
        return [(entry,) for entry in entries]

    def bind(self, intent: Intent, chosen: list[tuple]) -> Bindings:
        """Bindings of the drawn variables and of all that follows from them."""
        bindings: Bindings = {}
        for (variables, _), values in zip(intent.groups, chosen, strict=True):
            bindings.update(zip(variables, values, strict=True))
        for name, (function, *arguments) in intent.let.items():
            bindings[name] = self._evaluate(function, arguments, bindings)
        if intent.case is not None:
            function, *arguments = intent.case
            bindings["case"] = self._evaluate(function, arguments, bindings)
        return bindings

    def _evaluate(self, function: str, arguments: list[str], b: Bindings):
        match function:
            case "add":
                return b["a"] + b["b"]
            case "sub":
                return b["a"] - b["b"]
            case "max":
                return max(b["a"], b["b"])
            case "min":
                return min(b["a"], b["b"])
            case "more":
                return b["a"] > b["b"]
            case "winner":
                return b["u"] if b["a"] > b["b"] else b["v"]
            case "same":
                return b[arguments[0]] == b[arguments[1]]
            case "among":
                return b[arguments[0]] in [b[name] for name in arguments[1:]]
            case "relation":
                return self.lexicon["relative"][self.facts["relation"][b["x"].name][b["y"].name]]
            case "route":
                p, q = (self.lexicon["country"][b[v].facts["country"]] for v in arguments)
                europe = p.facts["continent"] == q.facts["continent"] == "europe"
                return self.lexicon["vehicle"]["train" if europe else "plane"]
            case "fact":
                variable, fact, *categories = arguments
                return self._entry(b[variable].facts[fact], categories)
            case "weather":
                city, month, fact, *categories = arguments
                climate, season = b[city].facts["climate"], b[month].facts["season"]
                return self._entry(self.facts["weather"][climate][season][fact], categories)
        raise ValueError(f"grammar.json: unknown function {function!r}")

    def _entry(self, value, categories: list[str]):
        for category in categories:
            if value in self.lexicon[category]:
                return self.lexicon[category][value]
        if categories:
            raise ValueError(f"no entry {value!r} in {categories}")
        return value

    def compile(
        self, text: str, language: str, upper: bool, result: str | None = None
    ) -> list[Element]:
        """Words and slots of a template; `result` names the variable that is a computed number."""
        elements: list[Element] = []
        for word in text.split():
            slot = SLOT.match(word)
            if slot is None:
                literal = self.forms.literal(word, language)
                elements += shout(literal) if upper else literal
                continue
            prefix, variable, form, argument = slot.groups()
            is_result = variable == result
            elements.append(
                Slot(
                    variable, form or "sg", argument, prefix, language, upper, is_result, self.forms
                )
            )
        return elements

    def answer_templates(self, say: dict, language: str, style: str) -> Iterator[tuple[str, float]]:
        """Every template text that answers in this style, with its probability."""
        wordings = {"full": say["full"], "key": say["key"]}
        wordings["items"] = [" ".join(f"- {item}" for item in say["items"])]
        frames = self.raw["answers"][style][language]
        for frame in frames:
            (slot,) = re.findall(r"{(\w+)}", frame)
            shares = self.raw["choices"][len(wordings[slot]) - 1]
            for wording, share in zip(wordings[slot], shares, strict=True):
                yield frame.replace(f"{{{slot}}}", wording), share / len(frames)
