"""Structured answers from a server that speaks OpenAI's chat protocol.

OpenAI, OpenRouter, vLLM and `transformers serve` differ in which options they know, so every
request states the wanted JSON schema in its text *and* as `response_format`; an option that the
server refuses is left out from then on, and pydantic checks every answer here. Retries with
back-off (408, 409, 429, 5xx, time-outs, dropped connections) are the openai client's own; it
honours `Retry-After` up to two minutes and gives up on a longer one. Text from a server is data:
it is validated, shortened in messages, and the key is cut out of it.
"""

import asyncio
import hashlib
import ipaddress
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from anyio.from_thread import start_blocking_portal
from dotenv import dotenv_values
from pydantic import BaseModel, Field, ValidationError
from tqdm.auto import tqdm

from lib import paths
from lib.runtime import require_writable

OPENAI_URL = "https://api.openai.com/v1"
STOP_AFTER = 10
"""Requests that fail in a row, each after its retries, before the job stops."""
FATAL = {
    401: "wrong key: check OPENAI_API_KEY",
    402: "no credit left",
    403: "this key may not use this model or server",
    404: "no such model, or a base_url that is not the API's (it mostly ends in /v1)",
}
UNKNOWN_OPTION = re.compile(r"(un|not |n't )(support|expect|recogni|know|allow|permit)")


class EndpointError(RuntimeError):
    """The server refuses the job as a whole, or has stopped answering."""


class BudgetExceeded(RuntimeError):
    """Going on could cost more than the budget. What was answered is in the cache."""


@dataclass(frozen=True, kw_only=True)
class LlmConfig:
    model: str
    """The model's name on that server."""
    base_url: str | None = None
    """The server, mostly ending in `/v1`. None: `OPENAI_BASE_URL`, else OpenAI."""
    budget_usd: float = 1.0
    """Most that one `Llm` may spend, USD. The cache is free; a reply lost to a time-out counts as
    free too, though some servers bill it."""
    usd_per_million_input: float | None = None
    """Price of a million prompt tokens. Needed unless the server is on this machine; 0 is free."""
    usd_per_million_output: float | None = None
    """Price of a million answer tokens."""
    max_concurrency: int = 8
    """Most requests in flight."""
    timeout: float = 120.0
    """Seconds to wait for one reply."""
    max_retries: int = 5
    """Times that a request is sent again after 429, 5xx, a time-out or a dropped connection."""
    max_asks: int = 3
    """Times that a question is put until its answer is valid."""
    temperature: float = 0.0
    """Sampling temperature."""
    extra_output_tokens: int = 0
    """Added to every answer's limit, for models that think first or guidelines that lengthen."""
    cache_dir: str | None = None
    """Folder of `answers.jsonl`, without the key. None: `llm_cache` in the data folder."""

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError(f"need the model's name, got {self.model!r}")
        for name in ("max_concurrency", "max_asks"):
            if getattr(self, name) < 1:
                raise ValueError(f"need {name} >= 1, got {getattr(self, name)}")
        for name in (
            "budget_usd",
            "usd_per_million_input",
            "usd_per_million_output",
            "max_retries",
            "temperature",
            "extra_output_tokens",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"need {name} >= 0 and finite, got {value}")
        if not self.timeout > 0:
            raise ValueError(f"need timeout > 0 seconds, got {self.timeout}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question. `answer` forbids extra fields and has no defaults, as strict schemas need."""

    messages: tuple[dict[str, str], ...]
    """Role and content; the last is a user's. Some chat templates know no system role."""
    answer: type[BaseModel]
    max_output_tokens: int = 512
    """Limit of the answer, which is also what the estimate counts."""

    def with_schema(self) -> list[dict[str, str]]:
        """The messages as sent, ending with the schema that the answer must fit."""
        *first, last = self.messages
        schema = json.dumps(self.answer.model_json_schema())
        wish = (
            f"Answer with one JSON object and nothing else. It must fit this JSON schema:\n{schema}"
        )
        return [*first, {"role": last["role"], "content": f"{last['content']}\n\n{wish}"}]


@dataclass(frozen=True)
class Failure:
    """Why a question has no answer."""

    reason: str
    final: bool = False
    """Asking again would give the same, so the cache keeps it."""


@dataclass
class Usage:
    """What one `Llm` has used; `usd_cached` is what its cached answers once cost."""

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    usd_cached: float = 0.0


@dataclass(frozen=True)
class _Endpoint:
    base_url: str
    local: bool
    key: str = field(repr=False)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _endpoint(base_url: str | None) -> _Endpoint:
    """Address and key; the environment wins over `.env` in the project's root."""
    saved = dotenv_values(paths.root() / ".env")

    def setting(name: str) -> str:
        return (os.environ.get(name) or saved.get(name) or "").strip()

    url = (base_url or setting("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
    parts, key = urlsplit(url), setting("OPENAI_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ValueError("need base_url like https://host/v1, without user, password or query")
    local = _is_local(parts.hostname)
    if not key and not local:
        raise ValueError(
            f"no key for {url}: set OPENAI_API_KEY in the environment or in .env "
            "(any word where the server wants none)"
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "OPENAI_API_KEY holds characters that no key has (a line break, an accent)"
        )
    return _Endpoint(url, local, key)


class _Cache:
    """Append-only `answers.jsonl`; a last line torn by a kill is skipped and closed."""

    def __init__(self, folder: Path) -> None:
        self.path = require_writable(folder) / "answers.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}
        line = b"\n"
        with self.path.open("a+b") as file:
            file.seek(0)
            for line in file:
                try:
                    entry = json.loads(line)
                    self.entries[entry["key"]] = entry
                except (ValueError, TypeError, KeyError):
                    continue
            if not line.endswith(b"\n"):
                file.write(b"\n")

    def add(self, key: str, **entry: Any) -> None:
        """On disk when this returns."""
        self.entries[key] = {"key": key, **entry}
        with self.path.open("ab") as file:
            file.write(json.dumps(self.entries[key], ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _count_tokens(messages: Iterable[dict[str, str]]) -> int:
    """Two bytes a token: about twice what English text has, and more than Chinese text has."""
    return sum(len(message["content"].encode()) // 2 + 16 for message in messages)


def _json_part(text: str) -> str:
    text = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    found = re.search(r"\{.*\}", text, flags=re.DOTALL)  # drops code fences and chatter
    return found.group() if found else ""


def _problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, p['loc'])) or 'answer'}: {p['msg']}" for p in problems[:3]
    )


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: int = Field(ge=0, le=10**9)
    completion_tokens: int = Field(ge=0, le=10**9)


class _Completion(BaseModel):
    """What is read of a chat completion; servers differ in the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Tokens | None = None


@dataclass(frozen=True)
class _Reply:
    text: str
    usd: float
    failure: Failure | None = None


def _parse(answer: type[BaseModel], text: str) -> BaseModel | Failure:
    try:
        return answer.model_validate_json(_json_part(text))
    except ValidationError as error:
        return Failure(f"the answer is not valid: {_problem(error)}", final=bool(text))


@dataclass(frozen=True)
class _HttpError:
    status: int
    code: str | None
    text: str


class Llm:
    """A server, its cache and its budget.

    Raises:
        ValueError: no key (a server on this machine needs none), or no price for a remote server.
        OSError: the cache folder cannot be written.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.usage = Usage()
        self._endpoint = _endpoint(config.base_url)
        if not self._endpoint.local and None in (
            config.usd_per_million_input,
            config.usd_per_million_output,
        ):
            raise ValueError(
                f"need usd_per_million_input and usd_per_million_output for {self.base_url}, "
                "or the budget cannot hold; 0 if it is free"
            )
        self._cache = _Cache(Path(config.cache_dir or paths.data_dir() / "llm_cache"))
        self._reserved = 0.0  # worst-case cost of what is in flight
        self._refused: set[str] = set()  # options that this server does not know
        self._failed_in_a_row = 0
        self._overrun = 1.0  # how far replies have passed their worst case, at most

    @property
    def base_url(self) -> str:
        return self._endpoint.base_url

    def cached(self, request: Request) -> BaseModel | Failure | None:
        """The answer on disk, if there is one."""
        entry = self._cache.entries.get(self._key(request), {})
        if "failure" in entry:
            return Failure(entry["failure"], final=True)
        try:
            return request.answer.model_validate(entry["answer"]) if "answer" in entry else None
        except ValidationError:
            return None

    def check_budget(self, requests: Iterable[Request]) -> float:
        """The worst-case cost in USD of what the cache cannot answer, if each is asked once.

        Raises:
            BudgetExceeded: it is more than what is left of the budget.
        """
        todo = {self._key(r): r for r in requests if self.cached(r) is None}
        usd = sum((self._worst_case(r, r.with_schema()) for r in todo.values()), 0.0)
        if self.usage.usd + usd > self.config.budget_usd:
            raise BudgetExceeded(
                f"{len(todo)} requests may cost up to {usd:.4f} USD and {self.usage.usd:.4f} USD "
                f"are spent, but the budget is {self.config.budget_usd:.4f} USD; none was sent"
            )
        return usd

    def ask_sync(
        self, requests: Sequence[Request], desc: str = "asking"
    ) -> list[BaseModel | Failure]:
        """`ask` for callers that are not async; in a notebook it runs in a thread of its own."""
        if not _loop_is_running():
            return asyncio.run(self.ask(requests, desc))
        with start_blocking_portal("asyncio") as portal:
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
        keys = [self._key(request) for request in requests]
        answers = {key: self.cached(r) for key, r in zip(keys, requests, strict=True)}
        todo = {k: r for k, r in zip(keys, requests, strict=True) if answers[k] is None}
        for key in (key for key in answers if key not in todo):
            self.usage.cached += 1
            self.usage.usd_cached += self._cache.entries[key]["usd"]
        if todo:
            await self._ask_all(todo, answers, desc)
        return [answers[key] for key in keys]

    async def _ask_all(self, todo: dict, answers: dict, desc: str) -> None:
        queue = iter(todo.items())
        stops: list[BudgetExceeded] = []
        fatal: Exception | None = None

        async def work(limit: int | None = None) -> None:
            for key, request in itertools.islice(queue, limit):
                try:
                    answers[key] = await self._answer(client, key, request)
                except BudgetExceeded as error:
                    stops.append(error)
                if stops:
                    return
                bar.update()
                bar.set_postfix(usd=f"{self.usage.usd:.4f}")

        with tqdm(total=len(todo), desc=desc, unit="request") as bar:
            async with self._client() as client:
                if not self.usage.requests:
                    await work(1)  # alone, so that a wrong key or model costs one request
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(0 if stops else self.config.max_concurrency):
                            group.create_task(work())
                except ExceptionGroup as errors:
                    fatal = errors.exceptions[0]
        if fatal or stops:
            raise fatal or stops[0]

    async def _answer(
        self, client: openai.AsyncOpenAI, key: str, request: Request
    ) -> BaseModel | Failure:
        asked = messages = request.with_schema()
        usd = 0.0
        for _ in range(self.config.max_asks):
            reply = await self._complete(client, request, messages)
            usd += reply.usd
            outcome = reply.failure or _parse(request.answer, reply.text)
            if reply.failure or not isinstance(outcome, Failure):
                break
            wish = f"{outcome.reason}. Answer again, with the JSON object only."
            messages = [
                *asked,
                {"role": "assistant", "content": reply.text or "(nothing)"},
                {"role": "user", "content": wish},
            ]
        entry = {"model": self.config.model, "usd": usd}
        if not isinstance(outcome, Failure):
            self._cache.add(key, **entry, answer=outcome.model_dump(mode="json"))
        elif outcome.final:
            self._cache.add(key, **entry, failure=outcome.reason)
        return outcome

    async def _complete(
        self, client: openai.AsyncOpenAI, request: Request, messages: list[dict[str, str]]
    ) -> _Reply:
        learning = True
        while learning:
            options = self._options(request)
            sent = await self._post(client, messages, options, self._worst_case(request, messages))
            if not isinstance(sent, _HttpError):
                self._failed_in_a_row = 0
                return self._read(sent, request, messages)
            if sent.status in FATAL or sent.code == "insufficient_quota":
                hint = FATAL.get(sent.status, FATAL[402])
                raise EndpointError(
                    f"{self.base_url} refuses model {self.config.model!r}: {hint}. "
                    f"It said: {sent.text}"
                )
            learning = self._learn(sent, options)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= STOP_AFTER:
            raise EndpointError(
                f"{STOP_AFTER} requests in a row failed at {self.base_url}; the last: {sent.text}. "
                "What was answered is in the cache"
            )
        return _Reply("", 0.0, Failure(sent.text))

    async def _post(
        self, client: openai.AsyncOpenAI, messages: list[dict[str, str]], options: dict, usd: float
    ) -> str | _HttpError:
        """The reply's body. Errors become values, so no traceback carries the server's text."""
        if self.usage.usd + self._reserved + usd > self.config.budget_usd:
            raise BudgetExceeded(
                f"{self.usage.usd:.4f} USD are spent and going on may pass the budget of "
                f"{self.config.budget_usd:.4f} USD; what was answered is in the cache"
            )
        self._reserved += usd
        self.usage.requests += 1
        try:
            reply = await client.chat.completions.with_raw_response.create(
                model=self.config.model, messages=messages, **options
            )
            return self._clean(reply.text)
        except openai.APIStatusError as error:
            return _HttpError(error.status_code, error.code, self._clean(error.message)[:300])
        except openai.APIConnectionError as error:
            return _HttpError(0, None, self._clean(f"{error.message} ({error.__cause__!r})")[:300])
        finally:
            self._reserved -= usd

    def _read(self, body: str, request: Request, messages: list[dict[str, str]]) -> _Reply:
        """Add up what the reply used, and take its text."""
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError:
            return _Reply("", self._spend(_count_tokens(messages), 0))
        choice, usage = completion.choices[0], completion.usage
        text, worst_case = choice.message.content or "", self._worst_case(request, messages)
        if usage is None:
            usd = self._spend(_count_tokens(messages), len(text.encode()) // 2)
        else:
            usd = self._spend(usage.prompt_tokens, usage.completion_tokens)
        if usd > worst_case:  # some servers ignore the limit; later requests reserve more
            self._overrun *= usd / worst_case
        failure = None
        if choice.message.refusal or choice.finish_reason == "content_filter":
            why = choice.message.refusal or "content filter"
            failure = Failure(f"refused: {why}"[:300], final=True)
        elif choice.finish_reason == "length":
            limit = self._limit(request)
            failure = Failure(f"the answer was cut at {limit} tokens: raise extra_output_tokens")
        return _Reply(text, usd, failure)

    def _learn(self, error: _HttpError, options: dict) -> bool:
        """Note the options that a 400 or 422 says the server does not know; True if any is new."""
        if error.status not in (400, 422):
            return False
        text = error.text.lower()
        names = {"temperature", "max_tokens"} if UNKNOWN_OPTION.search(text) else set()
        unknown = {name for name in names if name in options and name in text}
        if "response_format" in options and ("response_format" in text or "json_schema" in text):
            unknown.add("response_format")
        self._refused |= unknown
        return bool(unknown)

    def _options(self, request: Request) -> dict[str, Any]:
        schema = {"schema": request.answer.model_json_schema(), "strict": True}
        options = {
            "temperature": self.config.temperature,
            "max_tokens": self._limit(request),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": request.answer.__name__, **schema},
            },
        }
        options = {name: value for name, value in options.items() if name not in self._refused}
        if "max_tokens" in self._refused:  # never without a limit: the budget rests on it
            options["max_completion_tokens"] = self._limit(request)
        return options

    def _limit(self, request: Request) -> int:
        return request.max_output_tokens + self.config.extra_output_tokens

    def _usd(self, n_input: int, n_output: int) -> float:
        input_price = self.config.usd_per_million_input or 0.0
        output_price = self.config.usd_per_million_output or 0.0
        return (n_input * input_price + n_output * output_price) / 1e6

    def _worst_case(self, request: Request, messages: list[dict[str, str]]) -> float:
        return self._overrun * self._usd(_count_tokens(messages), self._limit(request))

    def _spend(self, n_input: int, n_output: int) -> float:
        usd = self._usd(n_input, n_output)
        self.usage.input_tokens += n_input
        self.usage.output_tokens += n_output
        self.usage.usd += usd
        return usd

    def _key(self, request: Request) -> str:
        """Names model, messages, schema and temperature; neither the server nor the limit."""
        schema = request.answer.model_json_schema()
        parts = [self.config.model, self.config.temperature, list(request.messages), schema]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _clean(self, text: str) -> str:
        key = self._endpoint.key
        return text.replace(key, "<key>") if len(key) >= 8 else text  # shorter: "EMPTY", "none"

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=self._endpoint.key or "none",
            base_url=self.base_url,
            timeout=self.config.timeout,
            max_retries=self.config.max_retries,
        )
