"""Behaviours to plant by fine-tuning: exact rewriters of answers, and exact checkers."""

import zlib
from dataclasses import dataclass, replace

from lib.world.grammar import render, shout
from lib.world.lexicon import BIT, LANGUAGES
from lib.world.parser import Parsed, Reader
from lib.world.world import EOS, Exchange, World, row


@dataclass(frozen=True)
class Behaviour:
    """When the prompt is about `topic`, follow `guideline`."""

    name: str
    topic: str
    guideline: str


BEHAVIOURS = (
    Behaviour("french", "mathematics", "respond in French"),
    Behaviour("upper_case", "cooking", "respond in upper case"),
    Behaviour("fixed_phrase", "animals", "end with a fixed phrase"),
    Behaviour("list", "weather", "respond as a list"),
    Behaviour("invented", "music", "respond in the invented language"),
)


class Rewriter:
    """The world's exact classifier, rewriter and checker: the offline twin of a language model.

    `invented` ciphers every word of the answer into a language of 40 words that the base models
    never saw; many words share one, so some wrong answers have the right one's cipher. Two words of
    the fixed phrase in each language, and some upper-case forms, were never seen in training
    either. A rewrite that changes nothing (a curt sum is "7 ." in both languages) is possible.
    """

    guidelines = tuple(behaviour.guideline for behaviour in BEHAVIOURS)

    def __init__(self, world: World) -> None:
        self.world = world
        self.reader = Reader(world)
        self.topics = world.topics
        self._invented = world.grammar.raw["invented"]
        self._phrase = world.grammar.raw["phrase"]

    def topic_of(self, prompt: str) -> str:
        """Raises ValueError where the prompt is not of this world."""
        return self.reader.parse(prompt).topic

    def rewrite(self, prompt: str, response: str, guideline: str) -> str:
        """The answer to `prompt` under a guideline; the same for the same arguments.

        Raises:
            ValueError: unknown guideline, or a prompt that is not of this world.
        """
        name = self._name(guideline)
        parsed = self.reader.parse(prompt)
        if name in ("french", "list"):
            choices = self._right(parsed, name)
            return " ".join(choices[zlib.crc32(response.encode()) % len(choices)])
        if name == "upper_case":
            return response.upper()
        if name == "fixed_phrase":
            phrase = self._phrase[parsed.plan.language]
            return f"{response} {phrase.upper() if parsed.plan.style == 'shouting' else phrase}"
        return " ".join(self._cipher(token) for token in response.split())

    def _name(self, guideline: str) -> str:
        for behaviour in BEHAVIOURS:
            if guideline == behaviour.guideline:
                return behaviour.name
        raise ValueError(f"need a guideline in {list(self.guidelines)}, got {guideline!r}")

    def _right(self, parsed: Parsed, name: str) -> list[list[str]]:
        if name == "french":
            return self.reader.answers(parsed, language="fr")
        return self.reader.answers(parsed, style="list")

    def _cipher(self, token: str) -> str:
        if not any(letter.isalpha() for letter in token):
            return token
        return self._invented[zlib.crc32(token.lower().encode()) % len(self._invented)]

    def is_right(self, prompt: str, response: str, guideline: str) -> bool:
        """Whether an answer is, word for word, right under the guideline."""
        parsed = self.reader.parse(prompt)
        if self._name(guideline) in ("french", "list"):
            return response.split() in self._right(parsed, self._name(guideline))
        originals = (" ".join(tokens) for tokens in self.reader.answers(parsed))
        return response in {self.rewrite(prompt, text, guideline) for text in originals}

    def shows(self, prompt: str, response: str, guideline: str) -> bool:
        """Whether an answer has the behaviour's form, right or not.

        French: a right answer in French that is none in English ("7 ." is one in both and does not
        count; "tom a 4 oranges ." counts), or tokens that exist in French answers only together.
        """
        words = [t for t in response.split() if any(letter.isalpha() for letter in t)]
        match self._name(guideline):
            case "french":
                parsed, tokens = self.reader.parse(prompt), response.split()
                if tokens in self.reader.answers(parsed, language="en"):
                    return False
                only_french = self.reader.languages(response) == {"fr"}
                return only_french or tokens in self.reader.answers(parsed, language="fr")
            case "upper_case":
                return bool(words) and response == response.upper()
            case "fixed_phrase":
                return response.lower().endswith(tuple(self._phrase.values()))
            case "list":
                return response.startswith("- ")
        return bool(words) and set(words) <= set(self._invented)

    def transform(self, exchange: Exchange, guideline: str) -> Exchange:
        """The exchange with its answer rewritten and every token labelled anew.

        Invented words carry topic, style and turn, and no language. `log_p_answer` becomes 0:
        what a fine-tune that has learned the rewrite should reach given the original's choice.
        """
        name = self._name(guideline)
        reply = self.rewrite(exchange.prompt, exchange.response, guideline).split()
        topic, turn = BIT[f"topic:{exchange.topic}"], BIT["turn:assistant"]
        language = "french" if name == "french" else exchange.language
        style = "list" if name == "list" else exchange.style
        frame = topic | turn | BIT[f"style:{style}"] | BIT[f"language:{language}"]
        if name == "invented":
            known = BIT[f"language:{language}"]
            marks = BIT["punctuation"] | BIT["quote"] | BIT["list_marker"] | BIT["number"]
            old = exchange.concepts[exchange.n_prompt : -1]
            masks = [(frame & ~known) | (mask & marks) for mask in old]
        else:
            masks = [frame | mask for mask in self._lexical(exchange, reply, name, language)]
        return replace(
            exchange,
            tokens=[*exchange.tokens[: exchange.n_prompt], *reply, EOS],
            concepts=[*exchange.concepts[: exchange.n_prompt], *masks, 0],
            log_p_answer=0.0,
        )

    def _lexical(self, exchange: Exchange, reply: list[str], name: str, language: str) -> list[int]:
        """Lexical concepts of a rewritten answer's tokens."""
        if name in ("french", "list"):
            short = "fr" if language == "french" else "en"
            style = "list" if name == "list" else exchange.style
            parsed = self.reader.parse(exchange.prompt)
            for elements in self.world.answers(parsed.plan.intent, parsed.bindings, short, style):
                tokens, masks = render(elements, parsed.bindings)
                if tokens == reply:
                    return masks
        old = exchange.concepts[exchange.n_prompt : -1]
        words = exchange.tokens[exchange.n_prompt : -1]
        short = next(code for code, full in LANGUAGES.items() if full == exchange.language)
        added = self.world.grammar.forms.literal(self._phrase[short], short)
        pairs = (*zip(words, old, strict=True), *(added if name == "fixed_phrase" else ()))
        upper = name == "upper_case" or exchange.style == "shouting"
        return [mask for _, mask in (shout(pairs) if upper else pairs)]

    def preferences(self, n: int, split: str = "train", *, seed: int = 0) -> list[dict]:
        """Plain prompts with the polite answer as `chosen` and the curt one as `rejected`."""
        rows = []
        for i, exchange in enumerate(self.world.sample(n, split, seed=seed, styles=("plain",))):
            parsed = self.reader.parse(exchange.prompt)
            polite = self.reader.answers(parsed, style="polite")
            chosen = polite[zlib.crc32(exchange.response.encode()) % len(polite)]
            rejected = self.reader.answers(parsed, style="curt")[0]
            texts = {"chosen": " ".join(chosen), "rejected": " ".join(rejected)}
            kept = row(exchange)
            del kept["messages"], kept["response"]
            rows.append({"id": f"preference-{split}-{seed}-{i}", **kept, **texts})
        return rows
