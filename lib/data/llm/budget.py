"""What was spent on a server, and the promise that it stays within the budget."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lib.data.llm.config import LlmConfig


class BudgetExceeded(RuntimeError):
    """Going on could cost more than the budget. What was answered is in the cache."""


@dataclass
class Usage:
    """What one `Llm` has used; `usd_cached` is what its cached answers once cost."""

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    usd_cached: float = 0.0


class Budget:
    """Every request reserves its worst case before it is sent."""

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.usage = Usage()
        self._reserved = 0.0  # worst-case cost of what is in flight
        self._overrun = 1.0  # how far replies have passed their worst case, at most

    def worst_case(self, messages: Iterable[dict[str, str]], limit: int) -> float:
        """USD that `messages` may cost, answered with `limit` tokens."""
        return self._overrun * self._usd(count_tokens(messages), limit)

    def require(self, usd: float, n_requests: int) -> None:
        """Raises BudgetExceeded if that much more would not fit."""
        if self.usage.usd + usd > self.config.budget_usd:
            raise BudgetExceeded(
                f"{n_requests} requests may cost up to {usd:.4f} USD and {self.usage.usd:.4f} USD "
                f"are spent, but the budget is {self.config.budget_usd:.4f} USD; none was sent"
            )

    @contextlib.contextmanager
    def reserve(self, usd: float) -> Iterator[None]:
        """Hold `usd` for a request in flight; BudgetExceeded if that does not fit."""
        if self.usage.usd + self._reserved + usd > self.config.budget_usd:
            raise BudgetExceeded(
                f"{self.usage.usd:.4f} USD are spent and going on may pass the budget of "
                f"{self.config.budget_usd:.4f} USD; what was answered is in the cache"
            )
        self._reserved += usd
        self.usage.requests += 1
        try:
            yield
        finally:
            self._reserved -= usd

    def spend(self, n_input: int, n_output: int, worst_case: float) -> float:
        """Add up one reply; returns its cost, USD."""
        usd = self._usd(n_input, n_output)
        self.usage.input_tokens += n_input
        self.usage.output_tokens += n_output
        self.usage.usd += usd
        if usd > worst_case:  # some servers ignore the limit; later requests reserve more
            self._overrun *= usd / worst_case
        return usd

    def _usd(self, n_input: int, n_output: int) -> float:
        input_price = self.config.usd_per_million_input or 0.0
        output_price = self.config.usd_per_million_output or 0.0
        return (n_input * input_price + n_output * output_price) / 1e6


def count_tokens(messages: Iterable[dict[str, str]]) -> int:
    """Two bytes a token: about twice what English text has, and more than Chinese text has."""
    return sum(len(message["content"].encode()) // 2 + 16 for message in messages)
