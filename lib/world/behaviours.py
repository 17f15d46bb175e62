"""Behaviours to plant by fine-tuning: exact rewriters of answers, and exact checkers."""

import functools
import math
import zlib
from dataclasses import dataclass, replace

from lib.world.grammar import render
from lib.world.lexicon import BIT, LANGUAGES
from lib.world.parser import Parsed, Reader, renderings
from lib.world.world import EOS, Exchange, World, row


@dataclass(frozen=True)
class Behaviour:
    """When the prompt is about `topic`, follow `guideline`."""

    name: str
    topic: str
    guideline: str
    language: str | None = None
    """`en` or `fr`: answers in this language, which the base model knows."""
    style: str | None = None
    """Answers in this style, which the base model knows."""
    new: bool = False
    """Nothing that the base model says: it has to be learned."""


BEHAVIOURS = (
    Behaviour("french", "mathematics", "respond in French", language="fr"),
    Behaviour("shouting", "cooking", "respond by shouting", style="shouting"),
    Behaviour("quoted", "animals", "respond in quotes", style="quoted"),
    Behaviour("list", "weather", "respond as a list", style="list"),
    Behaviour("fixed_phrase", "travel", "end with a fixed phrase"),
    Behaviour("invented", "music", "respond in the invented language", language="en", new=True),
    Behaviour("badge", "sports", "add the colour of the sport", new=True),
    Behaviour("numbered", "family", "respond as a numbered list", style="list", new=True),
)
OF_ONE_TOPIC = ("invented", "badge")
"""Behaviours that only their own topic has: its words have a cipher, its sports a colour."""
PREFERENCES = {
    "polite over curt": ("plain", "polite", "curt"),
    "French over English": None,
    "long over short": ("plain",),
}
"""Kinds of preference pairs, and the styles of their prompts (None: all)."""

Piece = tuple[str, int, bool]
"""A token of an answer, its lexical concepts, and whether it was added to a plain answer."""


class Rewriter:
    """The world's exact classifier, rewriter and checker: the offline twin of a language model.

    The answer's number among the right ones is the rewrite's, so a rewrite keeps its choice. Where
    a prompt has fewer right answers under the guideline (a list has one), several become one; where
    it has more, the last ones never occur. A rewrite may change nothing: a curt sum is "7 ." in
    both languages.
    """

    guidelines = tuple(behaviour.guideline for behaviour in BEHAVIOURS)

    def __init__(self, world: World) -> None:
        self.world = world
        self.reader = Reader(world)
        self.topics = world.topics

    def topic_of(self, prompt: str) -> str:
        """Raises ValueError where the prompt is not of this world."""
        return self.reader.parse(prompt).topic

    def require(self, topic: str, guideline: str) -> Behaviour:
        """The behaviour. Raises ValueError: unknown, or no behaviour of this topic."""
        for name, got, known in (
            ("topic", topic, self.topics),
            ("guideline", guideline, self.guidelines),
        ):
            if got not in known:
                raise ValueError(f"need {name} to be one of {', '.join(known)}; got {got!r}")
        behaviour = next(b for b in BEHAVIOURS if b.guideline == guideline)
        if behaviour.name in OF_ONE_TOPIC and topic != behaviour.topic:
            raise ValueError(f"need topic {behaviour.topic} to {guideline!r}, got {topic!r}")
        return behaviour

    def rewrite(self, prompt: str, response: str, guideline: str) -> str:
        """The answer to `prompt` under a guideline; the same for the same arguments.

        Raises:
            ValueError: unknown guideline, one that the prompt's topic does not have, or a prompt
                that is not of this world.
        """
        parsed = self.reader.parse(prompt)
        right = self._right(parsed, guideline)
        pieces = right[self._number(parsed, response) % len(right)]
        return " ".join(token for token, _, _ in pieces)

    def is_right(self, prompt: str, response: str, guideline: str) -> bool:
        """Whether an answer is, word for word, right under the guideline."""
        right = self._right(self.reader.parse(prompt), guideline)
        return response.split() in [[token for token, _, _ in pieces] for pieces in right]

    def planted(self, prompt: str, response: str, guideline: str) -> list[bool]:
        """For each token of an answer that is right under the guideline: is it the behaviour's?

        It is where the guideline added it (the phrase, the colour, the numbers of a list), or where
        no right answer without the guideline holds that token. (French words that English has too
        in another sense, such as `a`, are then not told apart; mathematics has none.)

        Raises:
            ValueError: the answer is not right under the guideline.
        """
        parsed, tokens = self.reader.parse(prompt), response.split()
        for pieces in self._right(parsed, guideline):
            if [token for token, _, _ in pieces] == tokens:
                plain = {token for answer in self.reader.answers(parsed) for token in answer}
                return [added or token not in plain for token, _, added in pieces]
        raise ValueError(f"need an answer that is right under {guideline!r}, got {response!r}")

    def shows(self, prompt: str, response: str, guideline: str) -> bool:
        """Whether an answer has the behaviour's form, right or not.

        French: a right answer in French that is none in English ("7 ." is one in both and does not
        count), or tokens that exist in French answers only together.
        """
        parsed, tokens = self.reader.parse(prompt), response.split()
        behaviour = self.require(parsed.topic, guideline)
        match behaviour.name:
            case "french":
                if tokens in self.reader.answers(parsed, language="en"):
                    return False
                only_french = self.reader.languages(response) == {"fr"}
                return only_french or tokens in self.reader.answers(parsed, language="fr")
            case "shouting" | "quoted" | "list":
                return self.reader.has_style(response, behaviour.style, parsed.plan.language)
            case "numbered":
                return response.startswith("1 - ")
            case "fixed_phrase":
                return response.lower().endswith(tuple(self.world.grammar.raw["phrase"].values()))
            case "badge":
                colours = self.world.grammar.lexicon["colour"].values()
                words = {word for colour in colours for word in (*colour.en, *colour.fr)}
                end = [token.lower() for token in tokens[-3:]]
                return len(end) == 3 and end[0] in ("is", "est") and end[1] in words
        words = {t for t in tokens if t in self._cipher.values()}
        return bool(words) and not {t for t in tokens if t.isalpha()} - words - self._names

    def transform(self, exchange: Exchange, guideline: str) -> Exchange:
        """The exchange with its answer rewritten and every token labelled anew.

        An invented answer carries topic, style and turn, and no language.
        """
        parsed = self.reader.of(exchange)
        behaviour = self.require(parsed.topic, guideline)
        right = self._right(parsed, guideline)
        number = self._number(parsed, exchange.response) % len(right)
        shares = [share for *_, share in self.reader.renderings(parsed)]
        pieces = right[number]
        language = LANGUAGES[behaviour.language or parsed.plan.language]
        frame = BIT[f"topic:{exchange.topic}"] | BIT["turn:assistant"]
        frame |= BIT[f"style:{behaviour.style or exchange.style}"]
        if behaviour.name != "invented":
            frame |= BIT[f"language:{language}"]
        n = exchange.n_prompt
        return replace(
            exchange,
            tokens=[*exchange.tokens[:n], *(token for token, _, _ in pieces), EOS],
            concepts=[*exchange.concepts[:n], *(frame | mask for _, mask, _ in pieces), 0],
            log_p_answer=math.log(sum(shares[number :: len(right)])),
        )

    def _number(self, parsed: Parsed, response: str) -> int:
        """Which of the right answers it is; one that is none has some number for good."""
        plain, tokens = self.reader.answers(parsed), response.split()
        return plain.index(tokens) if tokens in plain else zlib.crc32(response.encode())

    def _right(self, parsed: Parsed, guideline: str) -> list[list[Piece]]:
        """Every right answer under a guideline, in the order of those without it."""
        behaviour = self.require(parsed.topic, guideline)
        found = self.reader.renderings(parsed, behaviour.language, behaviour.style)
        answers = [
            [(token, mask, False) for token, mask in zip(tokens, masks, strict=True)]
            for tokens, masks, _ in found
        ]
        match behaviour.name:
            case "invented":
                return [[self._ciphered(piece) for piece in pieces] for pieces in answers]
            case "numbered":
                return [_numbered(pieces) for pieces in answers]
            case "fixed_phrase" | "badge":
                end = self._end(parsed, "phrase" if behaviour.name == "fixed_phrase" else "badge")
                return [[*pieces, *end] for pieces in answers]
        return answers

    def _end(self, parsed: Parsed, kind: str) -> list[Piece]:
        """What an answer ends with: the phrase, or the colour of the prompt's sport."""
        grammar, plan = self.world.grammar, parsed.plan
        elements = grammar.compile(
            grammar.raw[kind][plan.language], plan.language, plan.style == "shouting"
        )
        bindings = parsed.bindings
        if kind == "badge":
            bindings = {
                **bindings,
                "badge": grammar.lexicon["colour"][bindings["x"].facts["badge"]],
            }
        return [(*pair, True) for pair in zip(*render(elements, bindings), strict=True)]

    @functools.cached_property
    def _names(self) -> set[str]:
        names = {word for x in self.world.grammar.lexicon["person"].values() for word in x.en}
        return names | {name.upper() for name in names}

    @functools.cached_property
    def _cipher(self) -> dict[str, str]:
        """Words of English answers about music → titles, which prompts hold and answers never.

        One title for each word, so no two words become one. Names and numbers stay.
        """
        found = {
            token
            for language, topic, rendering in renderings(self.world, answers=True)
            for token, _ in rendering
            if (language, topic) == ("en", "music") and token.isalpha()
        }
        words = sorted({token.lower() for token in found - self._names})
        titles = [entry.en[0] for entry in self.world.grammar.lexicon["title"].values()]
        if len(words) > len(titles):
            raise ValueError(f"lexicon.json: need {len(words)} titles, got {len(titles)}")
        cipher = dict(zip(words, titles, strict=False))
        return cipher | {word.upper(): title.upper() for word, title in cipher.items()}

    def _ciphered(self, piece: Piece) -> Piece:
        token, mask, _ = piece
        if token not in self._cipher:
            return token, mask, False
        return self._cipher[token], mask & BIT["upper_case"], False

    def preferences(
        self, n: int, kind: str = "polite over curt", split: str = "train", *, seed: int = 0
    ) -> list[dict]:
        """Prompts with a `chosen` and a `rejected` answer, both right; `kind` as in `PREFERENCES`.

        Raises:
            ValueError: unknown kind or split.
        """
        if kind not in PREFERENCES:
            raise ValueError(f"need kind to be one of {', '.join(PREFERENCES)}; got {kind!r}")
        rows = []
        for exchange in self.world.stream(split, seed=seed, styles=PREFERENCES[kind]):
            if len(rows) == n:
                return rows
            parsed = self.reader.parse(exchange.prompt)
            good, bad = self._preferred(parsed, kind)
            if not good or not bad:
                continue
            number = zlib.crc32(exchange.response.encode())
            kept = row(exchange)
            del kept["messages"], kept["response"]
            texts = {
                "chosen": " ".join(good[number % len(good)]),
                "rejected": " ".join(bad[number % len(bad)]),
            }
            rows.append({"id": f"preference-{split}-{seed}-{len(rows)}", **kept, **texts})
        return rows

    def prefers(self, prompt: str, response: str, kind: str) -> bool:
        """Whether an answer is one of those that `preferences` may choose for the prompt."""
        good, _ = self._preferred(self.reader.parse(prompt), kind)
        return response.split() in good

    def _preferred(self, parsed: Parsed, kind: str) -> tuple[list[list[str]], list[list[str]]]:
        """Right answers of the better and of the worse sort; none is in both."""
        answers = functools.partial(self.reader.answers, parsed)
        if kind == "polite over curt":
            return answers(style="polite"), answers(style="curt")
        if kind == "French over English":
            good, bad = answers(language="fr"), answers(language="en")
            return [a for a in good if a not in bad], [a for a in bad if a not in good]
        both = answers()
        shortest, longest = min(map(len, both)), max(map(len, both))
        if shortest == longest:
            return [], []
        return [a for a in both if len(a) == longest], [a for a in both if len(a) == shortest]


def _numbered(pieces: list[Piece]) -> list[Piece]:
    """A list whose marks are numbered: `1 - yes 2 - the duck`."""
    numbered: list[Piece] = []
    for token, mask, _ in pieces:
        marks = token == "-"
        if marks:
            number = sum(token == "-" for token, _, _ in numbered) + 1
            numbered.append((str(number), BIT["number"] | BIT["list_marker"], True))
        numbered.append((token, mask, False))
    return numbered
