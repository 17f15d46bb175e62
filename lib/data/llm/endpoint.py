"""One question to one server: what is sent, what comes back, what it costs.

OpenAI, OpenRouter, vLLM and `transformers serve` differ in which options they know, so every
request states the wanted JSON schema in its text *and* as `response_format`; an option that the
server refuses is left out from then on, and pydantic checks every answer here. Retries with
back-off (408, 409, 429, 5xx, time-outs, dropped connections) are the openai client's own; it
honours `Retry-After` up to two minutes and gives up on a longer one. Text from a server is data:
it is validated, shortened in messages, and the key is cut out of it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import openai
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from lib.data.llm.budget import Budget, count_tokens
from lib.data.llm.config import LlmConfig, find_address

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


class EndpointError(RuntimeError):
    """The server refuses the job as a whole, or has stopped answering."""


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


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


class _Completion(BaseModel):
    """What is read of a chat completion; servers differ in the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Tokens | None = None


class Endpoint:
    """A server, the options that it knows, and what was spent there.

    Raises:
        ValueError: no key (a server on this machine needs none), or no price for a remote server.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.address = find_address(config.base_url)
        self.budget = Budget(config)
        if not self.address.local and None in (
            config.usd_per_million_input,
            config.usd_per_million_output,
        ):
            raise ValueError(
                f"need usd_per_million_input and usd_per_million_output for {self.address.url}, "
                "or the budget cannot hold; 0 if it is free"
            )
        self._refused: set[str] = set()  # options that this server does not know
        self._failed_in_a_row = 0

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=self.address.key or "none",
            base_url=self.address.url,
            timeout=self.config.timeout,
            max_retries=self.config.max_retries,
        )

    def worst_case(self, request: Request, messages: Iterable[dict[str, str]]) -> float:
        """USD that `messages` may cost, sent once."""
        return self.budget.worst_case(messages, self._limit(request))

    async def ask(
        self, client: openai.AsyncOpenAI, request: Request
    ) -> tuple[BaseModel | Failure, float]:
        """A valid answer or why there is none, and what it cost, USD."""
        asked = messages = request.with_schema()
        cost = 0.0
        for _ in range(MAX_ASKS):
            text, usd = await self._complete(client, request, messages)
            cost += usd
            outcome = text if isinstance(text, Failure) else _parse(request.answer, text)
            if outcome is text or not isinstance(outcome, Failure):
                break
            wish = f"{outcome.reason}. Answer again, with the JSON object only."
            messages = [
                *asked,
                {"role": "assistant", "content": text or "(nothing)"},
                {"role": "user", "content": wish},
            ]
        return outcome, cost

    async def _complete(
        self, client: openai.AsyncOpenAI, request: Request, messages: list[dict[str, str]]
    ) -> tuple[str | Failure, float]:
        """The reply's text and cost; asks again without the options that the server refuses."""
        learning = True
        while learning:
            options = self._options(request)
            usd = self.worst_case(request, messages)
            status, text = await self._post(client, messages, options, usd)
            if status == 200:
                self._failed_in_a_row = 0
                return self._read(text, request, messages)
            if status in FATAL:
                raise EndpointError(
                    f"{self.address.url} refuses model {self.config.model!r}: {FATAL[status]}. "
                    f"It said: {text}"
                )
            learning = status in (400, 422) and self._learn(text.lower(), options)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= STOP_AFTER:
            raise EndpointError(
                f"{STOP_AFTER} requests in a row failed at {self.address.url}; the last: {text}. "
                "What was answered is in the cache"
            )
        return Failure(text), 0.0

    async def _post(
        self, client: openai.AsyncOpenAI, messages: list[dict[str, str]], options: dict, usd: float
    ) -> tuple[int, str]:
        """Status and text. Errors become values, so no traceback carries the server's text."""
        try:
            with self.budget.reserve(usd):
                reply = await client.chat.completions.with_raw_response.create(
                    model=self.config.model, messages=messages, **options
                )
            return 200, self._clean(reply.text)
        except openai.APIStatusError as error:
            return error.status_code, self._clean(error.message)[:300]
        except openai.APIConnectionError as error:
            return 0, self._clean(f"{error.message} ({error.__cause__!r})")[:300]

    def _read(
        self, body: str, request: Request, messages: list[dict[str, str]]
    ) -> tuple[str | Failure, float]:
        """The reply's text and cost."""
        n_input, worst_case = count_tokens(messages), self.worst_case(request, messages)
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError:
            return "", self.budget.spend(n_input, 0, worst_case)
        choice, usage = completion.choices[0], completion.usage
        text = choice.message.content or ""
        if usage is None:
            usage = _Tokens(prompt_tokens=n_input, completion_tokens=len(text.encode()) // 2)
        usd = self.budget.spend(usage.prompt_tokens, usage.completion_tokens, worst_case)
        if choice.message.refusal:
            return Failure(f"refused: {choice.message.refusal}"[:300], final=True), usd
        if choice.finish_reason == "length":
            limit = self._limit(request)
            why = f"the answer was cut at {limit} tokens: raise extra_output_tokens"
            return Failure(why), usd
        return text, usd

    def _learn(self, error: str, options: dict) -> bool:
        """Note the options that the error says the server does not know; True if any is new."""
        names = {"temperature", "max_tokens"} if UNKNOWN_OPTION.search(error) else set()
        unknown = {name for name in names if name in options and name in error}
        if "response_format" in options and ("response_format" in error or "json_schema" in error):
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

    def _clean(self, text: str) -> str:
        key = self.address.key
        return text.replace(key, "<key>") if len(key) >= 8 else text  # shorter: "EMPTY", "none"


def _parse(answer: type[BaseModel], text: str) -> BaseModel | Failure:
    said = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    found = re.search(r"\{.*\}", said, flags=re.DOTALL)  # drops code fences and chatter
    try:
        return answer.model_validate_json(found.group() if found else "")
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        why = "; ".join(
            f"{'.'.join(map(str, p['loc'])) or 'answer'}: {p['msg']}" for p in problems[:3]
        )
        return Failure(f"the answer is not valid: {why}", final=bool(text))
