"""The built-in world: seeded chats in a tiny language whose every probability and label is known.

A chat is `<bos> <|user|> … <|assistant|> … <eos>`, words separated by spaces. A *plan* fixes topic,
language, style, intent, phrasing and wrap of a prompt; a plan's variables are drawn uniformly; the
answer is drawn among the few that are right, with known probabilities. No two derivations give the
same text, so the derivation's log-probability is the text's.
"""

import math
import random
import zlib
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from lib import paths
from lib.world.grammar import Bindings, Element, Grammar, Intent, render
from lib.world.lexicon import BIT, LANGUAGES, STYLES, TOPICS

BOS, USER, ASSISTANT, EOS = "<bos>", "<|user|>", "<|assistant|>", "<eos>"
SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
"""Shares of prompts, cut by a hash of the prompt: no prompt is in two splits."""
OUT_OF_DISTRIBUTION = ("ood_style", "ood_phrasing")
"""Topic × style pairs, and phrasings, that the other splits never show."""


@dataclass(eq=False)
class Plan:
    """How a prompt is put; `weight` is its probability within its split's table."""

    intent: Intent
    language: str
    style: str
    kind: str
    """`regular`, `ood_style`, `ood_phrasing`, or `both` (in no split)."""
    elements: list[Element]
    weight: float


@dataclass(slots=True)
class Exchange:
    """One chat with its labels.

    `tokens` and `concepts` (bit masks over `CONCEPTS`) run over the whole chat; special tokens
    carry no concept. `n_prompt` counts the tokens up to and including `<|assistant|>`.
    `log_p_prompt` and `log_p_answer` are in nats; the second is conditional on the prompt.
    """

    tokens: list[str]
    concepts: list[int]
    n_prompt: int
    topic: str
    language: str
    style: str
    intent: str
    bindings: Bindings
    log_p_prompt: float
    log_p_answer: float

    @property
    def prompt(self) -> str:
        return " ".join(self.tokens[2 : self.n_prompt - 1])

    @property
    def response(self) -> str:
        return " ".join(self.tokens[self.n_prompt : -1])


def split_of(prompt: str) -> str:
    """The split that a regular prompt belongs to, for every seed."""
    share = zlib.crc32(prompt.encode()) / 2**32
    return next(name for name, (low, high) in SPLITS.items() if low <= share < high)


class World:
    """The generator. Building it takes about a tenth of a second; it holds no random state."""

    topics = TOPICS
    styles = STYLES

    def __init__(self, folder: Path | None = None) -> None:
        self.grammar = Grammar(folder or paths.shipped_dir() / "world")
        self.plans = list(self._plans())
        self._answers: dict = {}

    def _plans(self) -> Iterator[Plan]:
        raw = self.grammar.raw
        held_out = {tuple(cell) for cell in raw["held_out"]}
        for intent in self.grammar.intents:
            siblings = sum(x.weight for x in self.grammar.intents if x.topic == intent.topic)
            for language in LANGUAGES:
                for style in STYLES:
                    wraps = raw["wraps"][style][language]
                    asks = intent.texts[language]["ask"]
                    base = (
                        raw["topics"][intent.topic]
                        * raw["languages"][language]
                        * raw["styles"][language][style]
                        * intent.weight
                        / (siblings * len(wraps))
                    )
                    for i, ask in enumerate(asks):
                        unseen, odd = i == len(asks) - 1, (intent.topic, style) in held_out
                        kind = (
                            ("both" if odd else "ood_phrasing")
                            if unseen
                            else ("ood_style" if odd else "regular")
                        )
                        weight = base if unseen else base / (len(asks) - 1)
                        for wrap in wraps:
                            text = wrap.replace("{}", ask)
                            elements = self.grammar.compile(text, language, style == "shouting")
                            yield Plan(intent, language, style, kind, elements, weight)

    def answers(
        self, intent: Intent, bindings: Bindings, language: str, style: str
    ) -> list[tuple[list[Element], float]]:
        """Compiled templates of every right answer, with their probabilities."""
        key = (intent.topic, intent.name, bindings.get("case"), language, style)
        if key not in self._answers:
            say = intent.say(language, bindings)
            self._answers[key] = [
                (self.grammar.compile(text, language, style == "shouting", intent.result), share)
                for text, share in self.grammar.answer_templates(say, language, style)
            ]
        return self._answers[key]

    def exchange(
        self,
        plan: Plan,
        bindings: Bindings,
        answer: list[Element],
        log_p: tuple[float, float],
    ) -> Exchange:
        """Put prompt and answer together and label every token."""
        prompt, prompt_masks = render(plan.elements, bindings)
        reply, reply_masks = render(answer, bindings)
        topic = BIT[f"topic:{plan.intent.topic}"]
        user = topic | BIT["turn:user"] | BIT[f"language:{LANGUAGES[plan.language]}"]
        user |= BIT[f"style:{plan.style}"]
        assistant = user & ~BIT["turn:user"] | BIT["turn:assistant"]
        return Exchange(
            [BOS, USER, *prompt, ASSISTANT, *reply, EOS],
            [0, 0, *(m | user for m in prompt_masks), 0, *(m | assistant for m in reply_masks), 0],
            len(prompt) + 3,
            plan.intent.topic,
            LANGUAGES[plan.language],
            plan.style,
            plan.intent.name,
            bindings,
            *log_p,
        )

    def stream(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        topics: tuple[str, ...] | None = None,
        styles: tuple[str, ...] | None = None,
    ) -> Iterator[Exchange]:
        """Endless exchanges of one split; the same seed gives the same bytes.

        `topics`, `styles` keep only these, with their relative frequencies.

        Raises:
            ValueError: unknown split, topic or style, or nothing is left to draw from.
        """
        table = self._table(split, topics, styles)
        total = sum(plan.weight for plan in table)
        cumulative = list(accumulate(plan.weight / total for plan in table))
        rng = random.Random(f"{split}/{seed}").random
        while True:
            plan = table[min(bisect(cumulative, rng()), len(table) - 1)]
            chosen = [values[int(rng() * len(values))] for _, values in plan.intent.groups]
            bindings = self.grammar.bind(plan.intent, chosen)
            answers = self.answers(plan.intent, bindings, plan.language, plan.style)
            shares = list(accumulate(share for _, share in answers))
            answer, share = answers[min(bisect(shares, rng()), len(answers) - 1)]
            ways = math.prod(len(values) for _, values in plan.intent.groups)
            log_p = (math.log(plan.weight / total / ways), math.log(share))
            exchange = self.exchange(plan, bindings, answer, log_p)
            if split in OUT_OF_DISTRIBUTION or split_of(exchange.prompt) == split:
                yield exchange

    def _table(self, split: str, topics=None, styles=None) -> list[Plan]:
        if split not in (*SPLITS, *OUT_OF_DISTRIBUTION):
            raise ValueError(f"need a split in {[*SPLITS, *OUT_OF_DISTRIBUTION]}, got {split!r}")
        for name, got, known in (("topic", topics, TOPICS), ("style", styles, STYLES)):
            if got is not None and (unknown := set(got) - set(known)):
                raise ValueError(f"need {name}s in {list(known)}, got {sorted(unknown)}")
        kind = split if split in OUT_OF_DISTRIBUTION else "regular"
        table = [
            plan
            for plan in self.plans
            if plan.kind == kind
            and (topics is None or plan.intent.topic in topics)
            and (styles is None or plan.style in styles)
        ]
        if not table:
            raise ValueError(f"split {split!r} has nothing with topics {topics}, styles {styles}")
        return table

    def sample(self, n: int, split: str = "train", *, seed: int = 0, **only) -> list[Exchange]:
        """The first `n` exchanges of `stream`."""
        stream = self.stream(split, seed=seed, **only)
        return [next(stream) for _ in range(n)]

    def chats(self, n: int, split: str = "train", *, seed: int = 0, **only) -> list[dict]:
        """Rows in the form that `lib.data.chats` reads: `id`, `messages`, `prompt`, …"""
        return [
            {"id": f"{split}-{seed}-{i}", **row(exchange)}
            for i, exchange in enumerate(self.sample(n, split, seed=seed, **only))
        ]


def row(exchange: Exchange) -> dict:
    """An exchange as a plain row."""
    return {
        "messages": [
            {"role": "user", "content": exchange.prompt},
            {"role": "assistant", "content": exchange.response},
        ],
        "prompt": exchange.prompt,
        "response": exchange.response,
        "topic": exchange.topic,
        "language": exchange.language,
        "style": exchange.style,
        "intent": exchange.intent,
    }
