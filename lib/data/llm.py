"""Structured answers from a server that speaks OpenAI's chat protocol.

`Llm` asks many questions at once, within a budget, and keeps every answer on disk. Servers differ
in which options they know, so every request states the wanted JSON schema in its text *and* as
`response_format`; an option that the server refuses is left out from then on, and pydantic checks
every answer here. Retries with back-off (408, 409, 429, 5xx, time-outs, dropped connections) are
the openai client's own; it honours `Retry-After` up to two minutes. Text from a server is data: it
is validated, shortened in messages, and the key is cut out of it.
"""

import asyncio
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from anyio.from_thread import start_blocking_portal
from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from pydantic import ValidationError
from tqdm.auto import tqdm

from lib.data import endpoint
from lib.data.endpoint import Answer, Failure, LlmConfig, Messages, Reply, Request, Usage

MAX_ASKS = 3
"""Times that a question is put until its answer is valid."""
STOP_AFTER = 10
"""Requests that fail in a row, each after its retries, before the job stops."""
FATAL = {
    401: "wrong key: check OPENAI_API_KEY",
    402: "no credit left",
    403: "this key may not use this model or server",
    404: "no such model, or a base_url that is not the API's (it mostly ends in /v1)",
}
UNKNOWN_OPTION = re.compile(r"(un|not |n't )(support|expect|recogni|know|allow|permit)")


class BudgetExceeded(RuntimeError):
    """Going on could cost more than the budget. What was answered is in the cache."""


class EndpointError(RuntimeError):
    """The server refuses the job as a whole, or has stopped answering."""


class Llm:
    """A server, its cache and its budget. Every request reserves its worst case before it is sent.

    Raises:
        ValueError: no key (a server on this machine needs none), or no price for a remote server.
        OSError: the cache folder cannot be written.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.base_url, self._key = endpoint.find_server(config)
        self.usage = Usage()
        self._cache = endpoint.Cache(config)
        self._reserved = 0.0  # worst-case cost of what is in flight
        self._overrun = 1.0  # how far replies have passed their worst case, at most
        self._refused: set[str] = set()  # options that this server does not know
        self._failed_in_a_row = 0

    def cached(self, request: Request) -> Answer | None:
        """The answer on disk, if there is one."""
        entry = self._cache.entries.get(self._cache.key(request), {})
        if "failure" in entry:
            return Failure(entry["failure"], final=True)
        return request.answer.model_validate(entry["answer"]) if entry else None

    def check_budget(self, requests: Iterable[Request]) -> None:
        """Raises BudgetExceeded if what is not cached, asked once, may cost more than is left."""
        todo = {self._cache.key(r): r for r in requests if self.cached(r) is None}
        usd = sum((self._worst_case(r, r.messages()) for r in todo.values()), 0.0)
        self._require(usd, f"{len(todo)} requests", "none was sent")

    def ask(self, requests: Sequence[Request], desc: str = "asking") -> list[Answer]:
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
        self.usage.cached += len(distinct) - len(todo)
        self.usage.usd_cached += sum(self._cache.entries[k]["usd"] for k in distinct.keys() - todo)
        if todo:
            with start_blocking_portal() as portal:  # in a thread: notebooks run a loop of theirs
                answers |= portal.call(self._ask_all, todo, desc)
        return [answers[key] for key in keys]

    async def _ask_all(self, todo: dict[str, Request], desc: str) -> dict[str, Answer]:
        queue, answers, stops = iter(todo.items()), {}, []
        openai = AsyncOpenAI(
            api_key=self._key.get_secret_value() or "none",
            base_url=self.base_url,
            max_retries=self.config.max_retries,
            http_client=endpoint.HttpClient(timeout=self.config.timeout),
        )

        async def work(limit: int | None = None) -> None:
            for key, request in itertools.islice(queue, limit):
                try:
                    answers[key], usd = await self._answer(client, request)
                    self._cache.add(key, answers[key], usd)
                except Exception as error:  # raised below, once what is in flight has ended
                    stops.append(error)
                if stops:
                    return
                bar.update()
                bar.set_postfix(usd=f"{self.usage.usd:.4f}")

        with tqdm(total=len(todo), desc=desc, unit="request") as bar:
            async with openai as client, asyncio.TaskGroup() as group:
                if not self.usage.requests:
                    await work(1)  # alone, so that a wrong key or model costs one request
                for _ in range(0 if stops else self.config.max_concurrency):
                    group.create_task(work())
        if stops:
            raise stops[0]
        return answers

    async def _answer(self, client: AsyncOpenAI, request: Request) -> tuple[Answer, float]:
        """A valid answer or why there is none, and what it cost, USD."""
        asked = messages = request.messages()
        cost = 0.0
        for _ in range(MAX_ASKS):
            text, usd = await self._complete(client, request, messages)
            cost += usd
            answer = text if isinstance(text, Failure) else request.parse(text)
            if answer is text or not isinstance(answer, Failure):
                break
            wish = f"{answer.reason}. Answer again, with the JSON object only."
            said = {"role": "assistant", "content": text or "(nothing)"}
            messages = [*asked, said, {"role": "user", "content": wish}]
        if isinstance(answer, Failure):
            return replace(answer, reason=self._clean(answer.reason)), cost
        return request.answer.model_validate_json(self._clean(answer.model_dump_json())), cost

    async def _complete(
        self, client: AsyncOpenAI, request: Request, messages: Messages
    ) -> tuple[str | Failure, float]:
        """A reply and its cost; asked for again without the options that the server refuses."""
        options, usd = self._options(request), self._worst_case(request, messages)
        self._require(self._reserved + usd, "going on", "what was answered is in the cache")
        self._reserved += usd
        self.usage.requests += 1
        create = client.chat.completions.with_raw_response.create
        try:
            raw = await create(model=self.config.model, messages=messages, **options)
            self._failed_in_a_row = 0
            return self._read(raw.text, request, messages)
        except APIStatusError as error:
            status, text = error.status_code, error.message
        except APIConnectionError as error:
            status, text = 0, f"{error.message} ({error.__cause__!r})"
        finally:
            self._reserved -= usd
        text = self._clean(text)[:300]  # out of `except`: no traceback holds the server's text
        where = f"{self.base_url}, model {self.config.model!r}"
        if status in FATAL:
            raise EndpointError(f"{where}: {FATAL[status]}. It said: {text}")
        if status in (400, 422) and self._learn(text.lower(), options):
            return await self._complete(client, request, messages)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= STOP_AFTER:
            raise EndpointError(f"{where}: {STOP_AFTER} requests in a row failed; the last: {text}")
        return Failure(text), 0.0

    def _read(self, body: str, request: Request, messages: Messages) -> tuple[str | Failure, float]:
        """The reply's text and cost, which is estimated where the server does not tell."""
        try:
            reply = Reply.model_validate_json(body)
        except ValidationError:
            reply = Reply()
        text, worst_case = self._clean(reply.text or ""), self._worst_case(request, messages)
        n_input = reply.n_input or endpoint.count_tokens(messages)
        n_output = reply.n_output or len(text.encode()) // 2
        usd = self._usd(n_input, n_output)
        self.usage.input_tokens += n_input
        self.usage.output_tokens += n_output
        self.usage.usd += usd
        if usd > worst_case:  # some servers ignore the limit; later requests reserve more
            self._overrun *= usd / worst_case
        if reply.refusal:
            return Failure(f"refused: {reply.refusal}"[:300], final=True), usd
        if reply.ended == "length":
            limit = self._limit(request)
            return Failure(f"the answer was cut at {limit} tokens: raise extra_output_tokens"), usd
        return text, usd

    def _options(self, request: Request) -> dict[str, Any]:
        wanted = {"name": request.answer.__name__, "strict": True, "schema": request.schema}
        # Never without a limit: the budget rests on it.
        limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        options = {
            "temperature": self.config.temperature,
            limit: self._limit(request),
            "response_format": {"type": "json_schema", "json_schema": wanted},
        }
        return {name: value for name, value in options.items() if name not in self._refused}

    def _learn(self, error: str, options: dict[str, Any]) -> bool:
        """Note the options that the error says the server does not know; True if there are any."""
        names = ["response_format"]
        names += ["temperature", "max_tokens"] if UNKNOWN_OPTION.search(error) else []
        error = error.replace("json_schema", "response_format")
        unknown = {name for name in names if name in options and name in error}
        self._refused |= unknown
        return bool(unknown)

    def _limit(self, request: Request) -> int:
        return request.max_output_tokens + self.config.extra_output_tokens

    def _worst_case(self, request: Request, messages: Messages) -> float:
        """USD that `messages` may cost, sent once."""
        return self._overrun * self._usd(endpoint.count_tokens(messages), self._limit(request))

    def _usd(self, n_input: int, n_output: int) -> float:
        prices = self.config.usd_per_million_input or 0.0, self.config.usd_per_million_output or 0.0
        return (n_input * prices[0] + n_output * prices[1]) / 1e6

    def _require(self, usd: float, who: str, state: str) -> None:
        spent, budget = self.usage.usd, self.config.budget_usd
        if spent + usd > budget:
            cost = f"{who} may cost up to {usd:.4f} USD and {spent:.4f} USD are spent"
            raise BudgetExceeded(f"{cost}, but the budget is {budget:.4f} USD; {state}")

    def _clean(self, text: str) -> str:
        key = self._key.get_secret_value()
        return text.replace(key, "<key>") if len(key) >= 8 else text  # shorter: "EMPTY", "none"
