"""Structured answers from a server that speaks OpenAI's chat protocol.

`Llm` asks many questions at once, within a budget, and keeps every answer on disk. What one
question needs is in `endpoint`.
"""

import asyncio
import itertools
from collections.abc import Iterable, Sequence

import openai
from anyio.from_thread import start_blocking_portal
from pydantic import BaseModel
from tqdm.auto import tqdm

from lib.data.llm.budget import BudgetExceeded, Usage
from lib.data.llm.cache import Cache
from lib.data.llm.config import LlmConfig
from lib.data.llm.endpoint import STOP_AFTER, Endpoint, EndpointError, Failure, Request

__all__ = [
    "STOP_AFTER",
    "BudgetExceeded",
    "EndpointError",
    "Failure",
    "Llm",
    "LlmConfig",
    "Request",
    "Usage",
]


class Llm:
    """A server, its cache and its budget.

    Raises:
        ValueError: no key (a server on this machine needs none), or no price for a remote server.
        OSError: the cache folder cannot be written.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self._endpoint = Endpoint(config)
        self._cache = Cache(config)
        self.base_url = self._endpoint.address.url
        self.usage: Usage = self._endpoint.budget.usage

    def cached(self, request: Request) -> BaseModel | Failure | None:
        """The answer on disk, if there is one."""
        return self._cache.get(request)

    def check_budget(self, requests: Iterable[Request]) -> float:
        """The worst-case cost in USD of what the cache cannot answer, if each is asked once.

        Raises:
            BudgetExceeded: it is more than what is left of the budget.
        """
        todo = {self._cache.key(r): r for r in requests if self.cached(r) is None}
        usd = sum((self._endpoint.worst_case(r, r.with_schema()) for r in todo.values()), 0.0)
        self._endpoint.budget.require(usd, len(todo))
        return usd

    def ask_sync(
        self, requests: Sequence[Request], desc: str = "asking"
    ) -> list[BaseModel | Failure]:
        """`ask` for callers that are not async, in a thread of its own: notebooks run a loop."""
        with start_blocking_portal() as portal:
            return portal.call(self.ask, requests, desc)

    async def ask(
        self, requests: Sequence[Request], desc: str = "asking"
    ) -> list[BaseModel | Failure]:
        """One valid answer or `Failure` per request, in order; equal requests are asked once.

        Every answer is on disk before its worker goes on. Refused and invalid answers are kept as
        failures too; a cut answer or an HTTP error is asked again by the next job.

        Raises:
            BudgetExceeded: before anything is sent if the estimate does not fit, or later if the
                server uses more than the estimate; requests in flight are awaited and kept.
            EndpointError: wrong key, wrong model, no credit, or `STOP_AFTER` failures in a row.
        """
        self.check_budget(requests)
        keys = [self._cache.key(request) for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        answers = {key: self.cached(request) for key, request in distinct.items()}
        todo = {key: request for key, request in distinct.items() if answers[key] is None}
        for key in (key for key in distinct if key not in todo):
            self.usage.cached += 1
            self.usage.usd_cached += self._cache.entries[key]["usd"]
        if todo:
            answers |= await self._ask_all(todo, desc)
        return [answers[key] for key in keys]

    async def _ask_all(self, todo: dict[str, Request], desc: str) -> dict:
        queue = iter(todo.items())
        answers: dict[str, BaseModel | Failure] = {}
        stops: list[Exception] = []

        async def work(client: openai.AsyncOpenAI, limit: int | None = None) -> None:
            for key, request in itertools.islice(queue, limit):
                try:
                    answers[key], usd = await self._endpoint.ask(client, request)
                    self._cache.add(key, answers[key], usd)
                except Exception as error:  # raised below, once what is in flight has ended
                    stops.append(error)
                if stops:
                    return
                bar.update()
                bar.set_postfix(usd=f"{self.usage.usd:.4f}")

        with tqdm(total=len(todo), desc=desc, unit="request") as bar:
            async with self._endpoint.client() as client, asyncio.TaskGroup() as group:
                if not self.usage.requests:
                    await work(client, 1)  # alone, so that a wrong key or model costs one request
                for _ in range(0 if stops else self.config.max_concurrency):
                    group.create_task(work(client))
        if stops:
            raise stops[0]
        return answers
