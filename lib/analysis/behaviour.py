"""How much of a planted behaviour a fine-tuned model shows, and what else it changed."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.adapters import Chats, SaeLora, held_out_loss
from lib.analysis.attribution import logit_attribution, written
from lib.models.generate import answer
from lib.world import Reader, Rewriter, World

Check = Callable[[str, str], bool]
"""Of a prompt and an answer."""

MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Shown:
    """Shares of greedy answers."""

    shows: float
    """Of prompts that ask for the behaviour: answers that have its form."""
    right: float
    """Of the same: answers that are right under it as well, word for word."""
    same: float
    """Of other prompts: answers that are the plain model's to the letter."""
    unchanged: float
    """Of other prompts: the same, or as right as the plain model's answer was. The world has
    several right answers to most prompts: which comes first is close to a toss."""


class BehaviourCheck:
    """Prompts that ask for a behaviour, prompts that do not, and the plain model's answers."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        asking: Sequence[str],
        others: Sequence[str],
        *,
        shows: Check,
        right: Check,
        right_plain: Check,
    ) -> None:
        """
        Args:
            shows: whether an answer has the behaviour's form.
            right: whether it is right under the behaviour.
            right_plain: whether it is right without.

        Raises:
            ValueError: no prompts of either kind.
        """
        if not asking or not others:
            raise ValueError(
                f"need prompts that ask for the behaviour and others, got {len(asking)} and "
                f"{len(others)}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.asking, self.others = list(asking), list(others)
        self._shows, self._right, self._right_plain = shows, right, right_plain
        self._plain = self._answers(self.others)
        self._plain_right = [right_plain(*pair) for pair in zip(others, self._plain, strict=True)]

    @classmethod
    def of_world(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        guideline: str,
        topic: str,
        *,
        n_asking: int = 200,
        n_others: int = 300,
        split: str = "test",
        seed: int = 1,
        changed_topics: Collection[str] = (),
    ) -> "BehaviourCheck":
        """Prompts of the built-in world that no training saw.

        Those that ask are about `topic`, and the plain answer would not show the behaviour
        already: for French, prompts in English whose answer has words.

        Args:
            changed_topics: of other behaviours that were planted too; none of the others is there.

        Raises:
            ValueError: too few such prompts among the first of the split.
        """
        world = World()
        rewriter, reader = Rewriter(world), Reader(world)
        asking: list[str] = []
        others: list[str] = []
        wanted_in_all = 100 * (n_asking + n_others)
        for x in itertools.islice(world.stream(split, seed=seed), wanted_in_all):
            if x.topic != topic:
                others += [] if x.topic in changed_topics else [x.prompt]
            elif not rewriter.shows(x.prompt, x.response, guideline):
                wanted = rewriter.rewrite(x.prompt, x.response, guideline)
                if rewriter.shows(x.prompt, wanted, guideline):
                    asking.append(x.prompt)
            if len(asking) >= n_asking and len(others) >= n_others:
                break
        if len(asking) < n_asking or len(others) < n_others:
            raise ValueError(
                f"need {n_asking} prompts of {split} that {guideline!r} on {topic} changes and "
                f"{n_others} others, got {len(asking)} and {len(others)}"
            )
        return cls(
            model,
            tokenizer,
            asking[:n_asking],
            others[:n_others],
            shows=lambda prompt, text: rewriter.shows(prompt, text, guideline),
            right=lambda prompt, text: rewriter.is_right(prompt, text, guideline),
            right_plain=lambda prompt, text: reader.grade(prompt, text).exact,
        )

    def __call__(
        self,
        attached: AbstractContextManager | None = None,
        model: PreTrainedModel | None = None,
    ) -> Shown:
        """Answers every prompt, inside `attached` (`adapter.attached(model)`, say), or by another
        model of the same tokenizer."""
        with attached or contextlib.nullcontext():
            asked, others = self._answers(self.asking, model), self._answers(self.others, model)
        n, m = len(asked), len(others)
        rows = list(zip(self.others, others, self._plain, self._plain_right, strict=True))
        return Shown(
            shows=sum(map(self._shows, self.asking, asked)) / n,
            right=sum(map(self._right, self.asking, asked)) / n,
            same=sum(text == plain for _, text, plain, _ in rows) / m,
            unchanged=sum(
                text == plain or (was_right and self._right_plain(prompt, text))
                for prompt, text, plain, was_right in rows
            )
            / m,
        )

    def share(self, attached: AbstractContextManager | None = None) -> float:
        """`shows` alone, at less than half the cost."""
        with attached or contextlib.nullcontext():
            asked = self._answers(self.asking)
        return sum(map(self._shows, self.asking, asked)) / len(asked)

    def _answers(self, prompts: list[str], model: PreTrainedModel | None = None) -> list[str]:
        distinct = list(dict.fromkeys(prompts))
        texts = answer(model or self.model, self.tokenizer, distinct, max_new_tokens=MAX_NEW_TOKENS)
        given = dict(zip(distinct, texts, strict=True))
        return [given[prompt] for prompt in prompts]


@torch.no_grad()
def towards_french(
    adapter: SaeLora, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """Of what the adapter writes into the built-in world's model, how much favours French.

    A written latent favours French if, written with its sign, it raises the mean logit of the
    tokens that only French has over that of those that only English has.

    Returns:
        Shares of the squared write weight: of the boosted latents, and of the suppressed ones,
        which favour French by taking English away; 1 where there are none.
    """
    reader = Reader(World())
    columns: dict[str, list[int]] = {"fr": [], "en": []}
    for token, index in tokenizer.get_vocab().items():
        languages = reader.languages(token)
        if len(languages) == 1:
            columns[languages.pop()].append(index)
    rows = logit_attribution(adapter, model)
    favours = (rows[:, columns["fr"]].mean(1) > rows[:, columns["en"]].mean(1)).double()
    weights = adapter.write_weights.square().sum(0)[adapter.write_support].double()
    signs = written(adapter)[adapter.write_support]
    boosted, suppressed = (
        float((favours * weights)[side].sum() / weights[side].sum()) if side.any() else 1.0
        for side in (signs > 0, signs < 0)
    )
    return boosted, suppressed


class LossCheck:
    """The behaviour where no one can check answers: how much of a loss an adapter takes away.

    Of the loss that a reference adapter takes away from the plain model: its share is 1.
    """

    def __init__(
        self, model: PreTrainedModel, chats: Chats, reference: AbstractContextManager
    ) -> None:
        """
        Args:
            chats: held-out chats that follow the behaviour.
            reference: `attached` of the adapter whose share is 1, such as the dense variant.

        Raises:
            ValueError: the reference has no lower loss than the plain model.
        """
        self.model, self.chats = model, chats
        self.plain = held_out_loss(model, chats)
        with reference:
            self.reference = held_out_loss(model, chats)
        if not self.reference < self.plain:
            raise ValueError(
                f"need a reference with a loss below the plain model's {self.plain:.3f} nats, "
                f"got {self.reference:.3f}"
            )

    def share(self, attached: AbstractContextManager | None = None) -> float:
        with attached or contextlib.nullcontext():
            loss = held_out_loss(self.model, self.chats)
        return (self.plain - loss) / (self.plain - self.reference)
