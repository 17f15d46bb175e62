"""Reading the world's text back: parsing prompts, the exact entropy floor, grading answers."""

import functools
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lib.world.grammar import Bindings, Element, Grammar, Intent, Slot, render
from lib.world.lexicon import BIT, LANGUAGES
from lib.world.world import ASSISTANT, EOS, Exchange, Plan, World


@dataclass(frozen=True)
class Parsed:
    """The one derivation of a prompt."""

    plan: Plan
    bindings: Bindings

    @property
    def topic(self) -> str:
        return self.plan.intent.topic


@dataclass(frozen=True)
class Grade:
    """What is right about an answer. All exact; `exact` implies the others."""

    exact: bool
    """One of the answers that the world could have given."""
    language: bool
    """Every token exists in the prompt's language."""
    style: bool
    """The form that the prompt's style asks for."""
    topic: bool
    """Every token occurs in answers about the prompt's topic."""
    numbers: bool
    """The same numbers, in the same order, as in a right answer."""


def _options(slot: Slot, live: list[list[tuple]], place: dict[str, tuple[int, int]]):
    """What a slot can give, by its first token: `{token: [(values, rendering)]}`."""
    group, i = place[slot.variable]
    bindings = {}
    if slot.argument:
        argument_group, j = place[slot.argument]
        bindings[slot.argument] = live[argument_group][0][j]
    options: dict[str, list] = {}
    for values in live[group]:
        rendering = slot({**bindings, slot.variable: values[i]})
        options.setdefault(rendering[0][0], []).append((values, rendering))
    return options


class Walker:
    """Follows tokens through templates; options of undetermined slots are kept, they recur."""

    def __init__(self) -> None:
        self._kept: dict[Slot, dict] = {}

    def __call__(self, elements: list[Element], intent: Intent, tokens: list[str]):
        """Probability of each prefix of `tokens` under a template, and the values that remain.

        Returns:
            `(prefix, chosen)`: `prefix[i]` is the probability of the first `i` tokens, up to the
            first token that the template cannot give; `chosen` holds one tuple of values per
            group, or None where the tokens are not exactly this template.
        """
        live = [values for _, values in intent.groups]
        place = {v: (g, i) for g, (vs, _) in enumerate(intent.groups) for i, v in enumerate(vs)}
        prefix, p = [1.0], 1.0
        for element in elements:
            at = len(prefix) - 1
            if at == len(tokens):
                return prefix, None
            if not isinstance(element, Slot):
                if tokens[at] != element[0]:
                    return prefix, None
                prefix.append(p)
                continue
            group = place[element.variable][0]
            whole = live[group] is intent.groups[group][1] and element.argument is None
            if whole and element not in self._kept:
                self._kept[element] = _options(element, live, place)
            options = self._kept[element] if whole else _options(element, live, place)
            before, left, depth = len(live[group]), options.get(tokens[at], []), 1
            while left:
                p *= len(left) / before
                prefix.append(p)
                if depth == len(left[0][1]):
                    break
                if at + depth == len(tokens):
                    return prefix, None
                token, before = tokens[at + depth], len(left)
                left = [(v, r) for v, r in left if depth < len(r) and r[depth][0] == token]
                depth += 1
            if not left:
                return prefix, None
            live[group] = [values for values, _ in left]
        if len(prefix) <= len(tokens) or any(len(values) > 1 for values in live):
            return prefix, None
        return prefix, [values[0] for values in live]


class Reader:
    """Parses, scores and grades text of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._walk = Walker()
        self._last: tuple[str, Parsed] | None = None  # one prompt is asked about several times
        self._plans: dict[tuple[str, str, str, str], Plan] = {}  # the first of each, for `of`
        self._starts: dict[str | None, list[Plan]] = {}
        for plan in world.plans:
            first = plan.elements[0]
            key = None if isinstance(first, Slot) else first[0]
            self._starts.setdefault(key, []).append(plan)

    def _candidates(self, tokens: list[str]) -> list[Plan]:
        return self._starts.get(tokens[0] if tokens else "", []) + self._starts.get(None, [])

    def parse(self, prompt: str) -> Parsed:
        """Raises ValueError where the prompt is not of this world (or, a defect, ambiguous)."""
        if self._last is None or self._last[0] != prompt:
            self._last = (prompt, self._parse(prompt))
        return self._last[1]

    def of(self, exchange: Exchange) -> Parsed:
        """What `parse` would find of its prompt, from how it was made."""
        if self._last is None or self._last[0] != exchange.prompt:
            if not self._plans:
                for plan in self.world.plans:
                    kind = (plan.intent.topic, plan.intent.name, plan.language, plan.style)
                    self._plans.setdefault(kind, plan)
            language = "fr" if exchange.language == "french" else "en"
            kind = (exchange.topic, exchange.intent, language, exchange.style)
            self._last = (exchange.prompt, Parsed(self._plans[kind], exchange.bindings))
        return self._last[1]

    def _parse(self, prompt: str) -> Parsed:
        tokens, found = prompt.split(), []
        for plan in self._candidates(tokens):
            _, chosen = self._walk(plan.elements, plan.intent, tokens)
            if chosen is not None:
                found.append(Parsed(plan, self.world.grammar.bind(plan.intent, chosen)))
        if len(found) != 1:
            what = "is not of this world" if not found else "has several derivations"
            raise ValueError(f"the prompt {what}: {prompt[:200]!r}")
        return found[0]

    def renderings(
        self, parsed: Parsed, language: str | None = None, style: str | None = None
    ) -> list[tuple[list[str], list[int], float]]:
        """Every right answer in a given or the prompt's language and style.

        As tokens, their lexical concepts, and its probability among these.
        """
        plan = parsed.plan
        templates = self.world.answers(
            plan.intent, parsed.bindings, language or plan.language, style or plan.style
        )
        return [(*render(elements, parsed.bindings), share) for elements, share in templates]

    def answers(
        self, parsed: Parsed, language: str | None = None, style: str | None = None
    ) -> list[list[str]]:
        """The tokens of `renderings`."""
        return [tokens for tokens, _, _ in self.renderings(parsed, language, style)]

    def surprisal(self, exchange: Exchange) -> Float[np.ndarray, " seq"]:
        """Exact nats of each token given those before it; 0 for `<bos>`, `<|user|>`.

        No predictor that has not seen the split's own hash can have a lower expected loss. It sums
        over every plan that is still possible, so it is no property of the derivation that was
        drawn; for exchanges of a regular split drawn without `topics` or `styles`, its sum is
        nevertheless `-(log_p_prompt + log_p_answer)`, which the tests check. Prompts of the
        out-of-distribution splits have no probability in training: ValueError.
        """
        prompt = [*exchange.tokens[2 : exchange.n_prompt - 1], ASSISTANT]
        table = self.world._table("train")
        total = sum(plan.weight for plan in table)
        mass = np.zeros(len(prompt) + 1)
        mass[0] = 1.0
        for plan in self._candidates(prompt):
            if plan.kind == "regular":
                elements = [*plan.elements, (ASSISTANT, 0)]
                prefix, _ = self._walk(elements, plan.intent, prompt)
                mass[1 : len(prefix)] += np.array(prefix[1:]) * plan.weight / total
        if not mass[-1] > 0:
            raise ValueError(f"the prompt has no probability in training: {exchange.prompt!r}")
        reply = [*exchange.tokens[exchange.n_prompt : -1], EOS]
        rivals = [
            ([*ts, EOS], share) for ts, _, share in self.renderings(self.parse(exchange.prompt))
        ]
        shared = [sum(p for r, p in rivals if r[:i] == reply[:i]) for i in range(len(reply) + 1)]
        nats = np.concatenate([-np.diff(np.log(mass)), -np.diff(np.log(shared))])
        return np.concatenate([[0.0, 0.0], nats])

    @functools.cached_property
    def _known(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """Tokens that answers can hold, by language and by topic."""
        by_language: dict[str, set[str]] = {"en": set(), "fr": set()}
        by_topic: dict[str, set[str]] = {topic: set() for topic in self.world.topics}
        for language, topic, rendering in renderings(self.world, answers=True):
            tokens = {token for token, _ in rendering}
            by_language[language] |= tokens
            by_topic[topic] |= tokens
        return by_language, by_topic

    def languages(self, response: str) -> set[str]:
        """Languages (`en`, `fr`) in which every token of an answer is possible; may be both."""
        tokens = set(response.split())
        return {name for name, known in self._known[0].items() if tokens <= known}

    def has_style(self, response: str, style: str, language: str) -> bool:
        """Whether an answer has the form of a style."""
        tokens = response.split()
        verbs = self.world.grammar.forms.words[language]
        has_verb = any(verbs.get(token, 0) & BIT["verb"] for token in tokens)
        frames = self.world.grammar.raw["answers"]
        opening = [frame.split("{")[0].strip() for frame in frames["polite"][language]]
        forms = {
            "list": response.startswith("- "),
            "quoted": tokens[:1] in (['"'], ["«"]) and tokens[-1] in ('"', "»"),
            "shouting": response.endswith("!") and response == response.upper(),
            "polite": any(response.startswith(f"{words} ") for words in opening),
        }
        forms["curt"] = not any(forms.values()) and not has_verb
        forms["plain"] = not any(forms.values()) and has_verb
        return forms[style]

    def grade(self, prompt: str, response: str) -> Grade:
        """Grade an answer exactly. Raises ValueError for a prompt that is not of this world."""
        parsed = self.parse(prompt)
        right = self.answers(parsed)
        tokens = response.split()
        if not tokens:
            return Grade(False, False, False, False, False)
        if tokens in right:
            return Grade(True, True, True, True, True)
        plan = parsed.plan
        numbers = [t for t in tokens if t.isdigit()]
        return Grade(
            False,
            plan.language in self.languages(response),
            self.has_style(response, plan.style, plan.language),
            set(tokens) <= self._known[1][plan.intent.topic],
            numbers in [[t for t in answer if t.isdigit()] for answer in right],
        )


def renderings(world: World, *, answers: bool):
    """Every `(language, topic, rendering)` that a literal or a slot of the grammar can give.

    Prompts are left out where only `answers` are asked for.
    """
    for intent in world.grammar.intents:
        pieces: dict[tuple, tuple[str, Element]] = {}
        choices = list(_choices(intent, world.grammar))
        for case in {b.get("case"): b for b in choices}.values():
            for language, style in itertools.product(LANGUAGES, world.styles):
                for elements, _ in world.answers(intent, case, language, style):
                    pieces.update(_distinct(elements, language))
        if not answers:
            for plan in (p for p in world.plans if p.intent is intent):
                pieces.update(_distinct(plan.elements, plan.language))
        for language, element in pieces.values():
            if isinstance(element, Slot):
                for rendering in {element(bindings) for bindings in choices}:
                    yield language, intent.topic, rendering
            else:
                yield language, intent.topic, (element,)


def _distinct(elements: list[Element], language: str) -> dict[tuple, tuple[str, Element]]:
    def key(e: Element) -> tuple:
        return (e.variable, e.form, e.argument, e.prefix, e.upper) if isinstance(e, Slot) else e

    return {(language, *key(element)): (language, element) for element in elements}


def _choices(intent: Intent, grammar: Grammar, most: int = 4000):
    """All bindings of an intent, or so many random ones that every slot takes all its values."""
    groups = [values for _, values in intent.groups]
    if math.prod(map(len, groups)) <= most:
        drawn = itertools.product(*groups)
    else:
        pick = random.Random(0).random
        drawn = ([v[int(pick() * len(v))] for v in groups] for _ in range(most))
    for values in drawn:
        yield grammar.bind(intent, list(values))
