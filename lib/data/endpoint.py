"""An endpoint's config and key, what is asked and answered there, and the answers on disk."""

import asyncio
import hashlib
import json
import os
import re
import warnings
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
from dotenv import dotenv_values
from pydantic import AliasPath, BaseModel, Field, SecretStr, ValidationError

from lib import paths
from lib.runtime import require_writable


class LlmConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    model: str = Field(pattern=r"\S")
    """The model's name on that server."""
    base_url: str | None = None
    """The server, mostly ending in `/v1`. None: `OPENAI_BASE_URL`, else OpenAI."""
    budget_usd: float = Field(1.0, ge=0)
    """Most that one `Llm` may spend, USD. The cache is free; a reply lost to a time-out counts as
    free too, though some servers bill it."""
    usd_per_million_input: float | None = Field(None, ge=0)
    """Price of a million prompt tokens. Needed unless the server is on this machine; 0 is free."""
    usd_per_million_output: float | None = Field(None, ge=0)
    """Price of a million answer tokens."""
    max_concurrency: int = Field(8, ge=1)
    """Most requests in flight."""
    timeout: float = Field(120.0, gt=0)
    """Seconds without a byte until a request is sent again; a reply may take twice that in all."""
    max_retries: int = Field(5, ge=0)
    """Times that a request is sent again after 429, 5xx, a time-out or a dropped connection."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature."""
    extra_output_tokens: int = Field(0, ge=0)
    """Added to every answer's limit, for models that think first or guidelines that lengthen."""
    cache_dir: str | None = None
    """Folder of `answers.jsonl`, without the key. None: `llm_cache` in the data folder."""


def find_server(config: LlmConfig) -> tuple[str, SecretStr]:
    """Address and key; the environment wins over `.env` in the project's root.

    Raises:
        ValueError: no address of a server; or, unless it is on this machine, no key or no prices.
    """
    saved, names = dotenv_values(paths.root() / ".env"), ("OPENAI_BASE_URL", "OPENAI_API_KEY")
    base_url, key = ((os.environ.get(name) or saved.get(name) or "").strip() for name in names)
    url = (config.base_url or base_url or "https://api.openai.com/v1").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ValueError("need base_url like https://host/v1, without user, password or query")
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY has characters that no key has (a line break, an accent)")
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not (key or local):
        wish = "set OPENAI_API_KEY in the environment or in .env (any word where none is wanted)"
        raise ValueError(f"no key for {url}: {wish}")
    if not local and None in (config.usd_per_million_input, config.usd_per_million_output):
        prices = "usd_per_million_input and usd_per_million_output"
        raise ValueError(f"need {prices} for {url}, or the budget cannot hold; 0 if it is free")
    return url, SecretStr(key)


class HttpClient(openai.DefaultAsyncHttpxClient):
    """Ends a reply that trickles: httpx's time-out is from one byte to the next."""

    async def send(self, request: Any, **options: Any) -> Any:
        try:
            async with asyncio.timeout(2 * self.timeout.read):
                return await super().send(request, **options)
        except TimeoutError:
            raise openai.APITimeoutError(request) from None


@dataclass(frozen=True)
class Failure:
    """Why a question has no answer."""

    reason: str
    final: bool = False
    """Asking again would give the same, so the cache keeps it."""


Answer = BaseModel | Failure
Messages = list[dict[str, str]]


class Reply(BaseModel):
    """What is read of a chat completion; servers differ in the rest, and may leave out any."""

    text: str | None = Field(None, alias=AliasPath("choices", 0, "message", "content"))
    refusal: str | None = Field(None, alias=AliasPath("choices", 0, "message", "refusal"))
    ended: str | None = Field(None, alias=AliasPath("choices", 0, "finish_reason"))
    n_input: int = Field(0, ge=0, alias=AliasPath("usage", "prompt_tokens"))
    n_output: int = Field(0, ge=0, alias=AliasPath("usage", "completion_tokens"))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question. `answer` forbids extra fields and has no defaults, as strict schemas need."""

    prompt: str
    answer: type[BaseModel]
    max_output_tokens: int = 512
    """Limit of the answer, which is also what the estimate counts."""

    @property
    def schema(self) -> dict[str, Any]:
        return self.answer.model_json_schema()

    def messages(self) -> Messages:
        """The prompt as sent, ending with the schema that the answer must fit."""
        wish = "Answer with one JSON object and nothing else. It must fit this JSON schema:"
        content = f"{self.prompt}\n\n{wish}\n{json.dumps(self.schema)}"
        return [{"role": "user", "content": content}]  # some chat templates know no system role

    def parse(self, text: str) -> Answer:
        """The validated answer, without thoughts, code fences and chatter around it."""
        said = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
        found = re.search(r"\{.*\}", said, flags=re.DOTALL)
        try:
            return self.answer.model_validate_json(found.group() if found else "")
        except ValidationError as error:
            flaws = error.errors(include_url=False, include_input=False, include_context=False)[:3]
            why = (f"{'.'.join(map(str, f['loc'])) or 'answer'}: {f['msg']}" for f in flaws)
            return Failure(f"the answer is not valid: {'; '.join(why)}", final=bool(text))


@dataclass
class Usage:
    """What one `Llm` has used; `usd_cached` is what its cached answers once cost."""

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    usd_cached: float = 0.0


def count_tokens(messages: Messages) -> int:
    """Two bytes a token: about twice what English text has, and more than Chinese text has."""
    return sum(len(message["content"].encode()) // 2 + 16 for message in messages)


class Cache:
    """Append-only `answers.jsonl`, so that no question is paid for twice."""

    def __init__(self, config: LlmConfig) -> None:
        folder = paths.resolve(config.cache_dir or paths.data_dir() / "llm_cache")
        self.config, self.path = config, require_writable(folder) / "answers.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}
        line = b"\n"
        with self.path.open("a+b") as file:
            file.seek(0)
            for line in file:
                try:
                    entry = json.loads(line)
                    self.entries[entry["key"]] = entry
                except (ValueError, KeyError, TypeError):
                    warnings.warn(f"skipped a damaged line of {self.path}", stacklevel=3)
            if not line.endswith(b"\n"):
                file.write(b"\n")  # torn by a kill

    def key(self, request: Request) -> str:
        """Names model, prompt, schema and temperature; neither the server nor the limit."""
        asked = [{"role": "user", "content": request.prompt}]
        parts = [self.config.model, self.config.temperature, asked, request.schema]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def add(self, key: str, answer: Answer, usd: float) -> None:
        """Keep an answer, or a failure that is final; on disk when this returns."""
        entry: dict[str, Any] = {"key": key, "model": self.config.model, "usd": usd}
        if isinstance(answer, BaseModel):
            entry["answer"] = answer.model_dump(mode="json")
        elif answer.final:
            entry["failure"] = answer.reason
        else:
            return
        self.entries[key] = entry
        with self.path.open("ab") as file:
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
