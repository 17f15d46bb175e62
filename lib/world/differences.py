"""Planted differences: chats in which several behaviours are at work, and where they show."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib.world.behaviours import BEHAVIOURS, Behaviour, Rewriter
from lib.world.world import Exchange

NEW = tuple(behaviour.name for behaviour in BEHAVIOURS if behaviour.new)
"""Behaviours that hold what the base model never says."""
REUSED = tuple(behaviour.name for behaviour in BEHAVIOURS if not behaviour.new)


@dataclass(frozen=True)
class Planted:
    """A chat, and what of it is a behaviour's."""

    exchange: Exchange
    behaviour: str
    """At work in this chat; empty where the answer is as it would have been."""
    tokens: list[bool]
    """For each token of the exchange: is it the behaviour's?"""


def planted_chats(
    rewriter: Rewriter, names: Sequence[str], *, split: str = "train", seed: int = 0
) -> Iterator[Planted]:
    """Chats of the world without end, each topic's answers under the behaviour of that topic.

    Args:
        names: of `BEHAVIOURS`; their topics differ.

    Raises:
        ValueError: an unknown behaviour or split.
    """
    unknown = sorted(set(names) - {*NEW, *REUSED})
    if unknown or not names:
        raise ValueError(f"need behaviours of {', '.join((*NEW, *REUSED))}; got {list(names)}")
    by_topic = {behaviour.topic: behaviour for behaviour in BEHAVIOURS if behaviour.name in names}
    stream = rewriter.world.stream(split, seed=seed)
    return (_planted(rewriter, exchange, by_topic.get(exchange.topic)) for exchange in stream)


def _planted(rewriter: Rewriter, exchange: Exchange, behaviour: Behaviour | None) -> Planted:
    if behaviour is None:
        return Planted(exchange, "", [False] * len(exchange.tokens))
    changed = rewriter.transform(exchange, behaviour.guideline)
    if changed.tokens == exchange.tokens:
        return Planted(exchange, "", [False] * len(exchange.tokens))
    own = rewriter.planted(changed.prompt, changed.response, behaviour.guideline)
    return Planted(changed, behaviour.name, [*[False] * changed.n_prompt, *own, False])


def take(chats: Iterator[Planted], n: int) -> list[Planted]:
    """The next `n` chats."""
    return list(itertools.islice(chats, n))
