"""A chat-completions server on 127.0.0.1 that misbehaves on demand.

`with Loopback(fault=...) as server: ... server.url`. It answers what `lib.data.rewrite` asks by
simple rules: a prompt with a digit is about mathematics, and every rewriting puts "[FR] " before
the response.
"""

import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from tests.kills import kill

TLS = ssl.create_default_context()
KEY = "sk-loopback-0123456789-secret"


def question(body: dict) -> dict:
    """The data of a request: the first line of its messages that is a JSON object."""
    lines = body["messages"][0]["content"].splitlines()
    return json.loads(next(line for line in lines if line.startswith("{")))


def by_rules(body: dict) -> dict[str, Any]:
    """The fields of the answer to a classification or a rewriting."""
    data = question(body)
    if "response" in data:
        return {"response": f"[FR] {data['response']}"}
    maths = any(letter.isdigit() for letter in data["prompt"])
    return {"topic": "mathematics" if maths else "something else", "matches": maths}


def isolate(monkeypatch: Any, root: Path) -> None:
    """No key, address, `.env` or proxy of the developer's; short back-off.

    Reading the machine's certificates takes 0.1 s a client, so that is done once.
    """
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LATENT_BENCH_ROOT", str(root))
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("ssl.create_default_context", lambda *args, **kwargs: TLS)


def first(n: int, fault: str) -> Callable[[int, dict], str | None]:
    """`fault` for the first n requests, then none."""
    return lambda number, body: fault if number <= n else None


class Loopback(ThreadingHTTPServer):
    """`fault(number, body)` names what goes wrong with that request, counted from 1:

    `429`, `429 after 1.5` (Retry-After), `500`, `400`, `slow 0.5`, `drop` (half a reply), `html`,
    `broken` (no JSON), `schema` (wrong fields), `fenced`, `refusal`, `cut`, `no usage`, or None.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        *,
        answer: Callable[[dict], dict] = by_rules,
        fault: Callable[[int, dict], str | None] = lambda number, body: None,
        key: str | None = None,
        model: str | None = None,
        refused_options: tuple[str, ...] = (),
        latency: float = 0.0,
        completion_tokens: int = 10,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.fault, self.key, self.model = answer, fault, key, model
        self.refused_options, self.latency = refused_options, latency
        self.completion_tokens = completion_tokens
        self.lock = threading.Lock()
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.answered: Counter[str] = Counter()  # whole valid answers, by content
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""

    def kill_after(self, n_answered: int, process: BaseProcess) -> int:
        """Kill a client after so many answers; returns how many requests it had sent."""
        deadline = time.monotonic() + 60
        while self.answered.total() < n_answered and time.monotonic() < deadline:
            time.sleep(0.002)
        kill(process)
        time.sleep(0.2)
        while self.in_flight:
            time.sleep(0.002)
        return len(self.bodies)


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # headers and body are two writes
    protocol_version = "HTTP/1.1"
    server: Loopback

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.times.append(time.monotonic())
            number = len(server.bodies)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            time.sleep(server.latency)
            self._reply(body, server.fault(number, body) or "")
        finally:
            with server.lock:
                server.in_flight -= 1

    def _reply(self, body: dict, fault: str) -> None:
        kind, _, value = fault.partition(" ")
        if problem := self._problem(body):
            self._error(*problem)
        elif kind in ("400", "429", "500", "503"):
            after = {"Retry-After": value.removeprefix("after ")} if value else {}
            self._error(int(kind), f"asked to fail with {kind}", **after)
        elif kind == "html":
            self._send(200, b"<html>a proxy's page</html>", **{"Content-Type": "text/html"})
        elif kind == "drop":
            self._send(200, b'{"choices": [', **{"Content-Length": "1000"})
            self.close_connection = True
        else:
            if kind == "slow":
                time.sleep(float(value))
            self._send(200, self._completion(body, fault))
            if kind in ("", "slow", "fenced", "no"):
                with self.server.lock:
                    self.server.answered[json.dumps(body["messages"])] += 1

    def _problem(self, body: dict) -> tuple[int, str] | None:
        server = self.server
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if server.key and given != server.key:
            return 401, f"Incorrect API key provided: {given}"
        if server.model and body["model"] != server.model:
            return 404, f"The model {body['model']} does not exist"
        for name in server.refused_options:
            if name in body:
                return 400, f"Unsupported parameter: '{name}' is not supported with this model."
        return None

    def _completion(self, body: dict, fault: str) -> bytes:
        content = json.dumps({"unknown": 1} if fault == "schema" else self.server.answer(body))
        message = {"role": "assistant", "content": content}
        if fault == "broken":
            message["content"] = content[: len(content) // 2]
        if fault == "fenced":
            message["content"] = f"<think>{{so}}</think>Here it is:\n```json\n{content}\n```"
        if fault == "refusal":
            message |= {"content": None, "refusal": "I will not."}
        reason = "length" if fault == "cut" else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "choices": [choice]}
        completion["model"] = body["model"]
        if fault != "no usage":
            tokens = self.server.completion_tokens
            completion["usage"] = {"prompt_tokens": 100, "completion_tokens": tokens}
        return json.dumps(completion).encode()

    def _error(self, status: int, message: str, **headers: str) -> None:
        error = {"message": message, "type": "error", "param": None, "code": None}
        self._send(status, json.dumps({"error": error}).encode(), **headers)

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
