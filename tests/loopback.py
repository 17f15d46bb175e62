"""A chat-completions server that misbehaves on demand, in this process and without a socket.

Inside `with Loopback(fault=...) as server`, requests of `lib.data.llm` end here instead of in a
network. It answers what `lib.data.rewrite` asks by simple rules: a prompt with digits is about
mathematics, and every rewriting puts "[FR] " before the response.
"""

import asyncio
import functools
import inspect
import json
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self
from unittest import mock

import openai

from lib.data import endpoint
from tests.kills import kill

# openai's own, httpx or httpx2
httpx = sys.modules[openai.DefaultAsyncHttpxClient.__base__.__module__.partition(".")[0]]


def question(body: dict) -> dict:
    """The data of a request: the first line of its messages that is a JSON object."""
    lines = body["messages"][0]["content"].splitlines()
    return json.loads(next(line for line in lines if line.startswith("{")))


def by_rules(body: dict) -> dict[str, Any]:
    """The fields of the answer to a classification or a rewriting."""
    data = question(body)
    if "response" in data:
        return {"response": f"[FR] {data['response']}"}
    maths = any(character.isdigit() for character in data["prompt"])
    return {"topic": "mathematics" if maths else "something else", "matches": maths}


def isolate(monkeypatch: Any, root: Path) -> None:
    """For tests: no key, address, `.env` or proxy of the developer's; short back-off."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("LATENT_BENCH_ROOT", str(root))
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


class Loopback:
    """`fault(number, body)` names what goes wrong with that request, counted from 1, or waits:

    a status (`429`, `429 after 90` with Retry-After), `silent`, `trickle`, `drop` (half a reply),
    `html`, `broken` (no JSON), `schema` (wrong fields), `fenced`, `refusal`, `cut`, `no usage`, or
    None.
    """

    url = "http://127.0.0.1:8765/v1"

    def __init__(
        self,
        *,
        answer: Callable[[dict], dict] = by_rules,
        fault: Callable[[int, dict], str | Awaitable[None] | None] = lambda number, body: None,
        key: str | None = None,
        model: str | None = None,
        refused_options: tuple[str, ...] = (),
        completion_tokens: int = 10,
    ) -> None:
        self.answer, self.fault, self.key, self.model = answer, fault, key, model
        self.refused_options, self.completion_tokens = refused_options, completion_tokens
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = 0

    def settings(self, folder: Path, **settings: Any) -> dict[str, Any]:
        """For `LlmConfig`: patient enough for a busy machine, and a cache below `folder`."""
        known = {"model": "m", "base_url": self.url, "cache_dir": str(folder / "cache")}
        return known | {"max_retries": 2, "max_concurrency": 4, "timeout": 20.0} | settings

    def __enter__(self) -> Self:
        client = functools.partial(endpoint.HttpClient, transport=httpx.MockTransport(self.serve))
        self.patch = mock.patch.object(endpoint, "HttpClient", client)
        self.patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.patch.stop()

    async def serve(self, request: Any) -> Any:
        assert str(request.url) == f"{self.url}/chat/completions"
        body = json.loads(request.content)
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            fault = self.fault(len(self.bodies), body)
            fault = await fault if inspect.isawaitable(fault) else fault
            return self._problem(request, body) or self._reply(request, body, fault or "")
        finally:
            self.in_flight -= 1

    def _problem(self, request: Any, body: dict) -> Any:
        given = request.headers["Authorization"].removeprefix("Bearer ")
        if self.key and given != self.key:
            return _error(401, f"Incorrect API key provided: {given}")
        if self.model and body["model"] != self.model:
            return _error(404, f"The model {body['model']} does not exist")
        for name in self.refused_options:
            if name in body:
                return _error(400, f"Unsupported parameter: '{name}' is not supported here.")
        return None

    def _reply(self, request: Any, body: dict, fault: str) -> Any:
        status, _, seconds = fault.partition(" after ")
        if status.isdigit():
            headers = {"Retry-After": seconds} if seconds else {}
            return _error(int(status), f"asked to fail with {status}", headers)
        if fault == "silent":
            raise httpx.ReadTimeout(fault, request=request)
        if fault == "drop":
            raise httpx.RemoteProtocolError(fault, request=request)
        if fault == "trickle":
            return httpx.Response(200, content=_trickle())
        if fault == "html":
            return httpx.Response(200, html="<html>a proxy's page</html>")
        content = json.dumps({"unknown": 1} if fault == "schema" else self.answer(body))
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if fault == "broken":
            message["content"] = content[: len(content) // 2]
        if fault == "fenced":
            message["content"] = f"<think>{{so}}</think>Here it is:\n```json\n{content}\n```"
        if fault == "refusal":
            message |= {"content": None, "refusal": "I will not."}
        choice = {"message": message, "finish_reason": "length" if fault == "cut" else "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": self.completion_tokens}
        told = {} if fault == "no usage" else {"usage": usage}
        return httpx.Response(200, content=json.dumps({"choices": [choice]} | told))


async def _trickle() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(0.02)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Any:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return httpx.Response(status, json={"error": error}, headers=headers)


def kill_after(n_kept: int, server: Loopback, job: Callable[[], None], cache: Path) -> None:
    """Run `job` in a fork, where later requests wait, and kill it with `n_kept` answers on disk."""

    async def hold(number: int, body: dict) -> None:
        if number > n_kept:
            await asyncio.Event().wait()

    def held() -> None:
        server.fault = hold
        job()

    def n_lines() -> int:
        return cache.read_bytes().count(b"\n") if cache.exists() else 0

    process = multiprocessing.get_context("fork").Process(target=held)
    process.start()
    while process.is_alive() and n_lines() < n_kept:
        time.sleep(0.002)
    kill(process)
    assert n_lines() == n_kept
