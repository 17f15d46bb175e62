"""A chat-completions server on 127.0.0.1 that misbehaves on demand.

In tests: `with Loopback(fault=...) as server: ... server.url`. By hand, for a notebook:
`python -m tests.loopback --port 8765`, then `base_url=http://127.0.0.1:8765/v1`. It answers what
`lib.data.rewrite` asks by simple rules: a prompt with digits or number words is about mathematics,
and every rewriting puts "[FR] " before the response.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.kills import kill

TLS = ssl.create_default_context()
NUMBERS = "one two three four five six seven eight nine ten plus minus sum number percent"
MATHS = re.compile(rf"\d|\b({'|'.join(NUMBERS.split())})\b", re.IGNORECASE)


def question(body: dict) -> dict:
    """The data of a request: the first line of its messages that is a JSON object."""
    lines = body["messages"][0]["content"].splitlines()
    return json.loads(next((line for line in lines if line.startswith("{")), "{}"))


def by_rules(body: dict) -> dict[str, Any]:
    """The fields of the answer to a classification or a rewriting."""
    data = question(body)
    if "response" in data:
        return {"response": f"[FR] {data['response']}"}
    maths = bool(MATHS.search(data.get("prompt", "")))
    return {"topic": "mathematics" if maths else "something else", "matches": maths}


def isolate(monkeypatch: Any, root: Path) -> None:
    """For tests: no key, address, `.env` or proxy of the developer's; short back-off.

    Reading the machine's certificates takes 0.1 s a client, so that is done once.
    """
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LATENT_BENCH_ROOT", str(root))
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("ssl.create_default_context", lambda *args, **kwargs: TLS)


class Loopback(ThreadingHTTPServer):
    """`fault(number, body)` names what goes wrong with that request, counted from 1:

    a status (`429`, `429 after 90` with Retry-After), `silent`, `trickle`, `drop` (half a reply),
    `html`, `broken` (no JSON), `schema` (wrong fields), `fenced`, `refusal`, `cut`, `no usage`, or
    None.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        *,
        port: int = 0,
        answer: Callable[[dict], dict] = by_rules,
        fault: Callable[[int, dict], str | None] = lambda number, body: None,
        key: str | None = None,
        model: str | None = None,
        refused_options: tuple[str, ...] = (),
        completion_tokens: int = 10,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.fault, self.key, self.model = answer, fault, key, model
        self.refused_options, self.completion_tokens = refused_options, completion_tokens
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def settings(self, folder: Path, **settings: Any) -> dict[str, Any]:
        """For `LlmConfig`: patient enough for a busy machine, and a cache below `folder`."""
        known = {"model": "m", "base_url": self.url, "cache_dir": str(folder / "cache")}
        return known | {"max_retries": 2, "max_concurrency": 4, "timeout": 20.0} | settings

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


@contextlib.contextmanager
def killed_after(n_kept: int, job: Callable[[], None], server: Loopback, cache: Path) -> Iterator:
    """Run `job` in a process and kill it with `n_kept` answers on disk; then `server` serves on.

    Later requests are held until then, so the job cannot end before. It is forked, so that nothing
    is imported again, before the server has threads.
    """
    dead = threading.Event()

    def hold(number: int, body: dict) -> None:
        if number > n_kept:
            dead.wait()

    server.fault = hold
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    with server:
        while process.is_alive() and not (cache.exists() and _n_lines(cache) >= n_kept):
            time.sleep(0.002)
        kill(process)
        dead.set()
        while server.in_flight:
            time.sleep(0.002)
        assert _n_lines(cache) == n_kept <= len(server.bodies) <= n_kept + 4
        yield


def _n_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n")


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
            number = len(server.bodies)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            reply = self._reply(body, server.fault(number, body) or "")
        finally:
            with server.lock:  # before the reply: the client may be quicker than this thread
                server.in_flight -= 1
        if reply:
            self._send(*reply)

    def _reply(self, body: dict, fault: str) -> tuple | None:
        """Status, body and headers; None if there is no whole reply to send."""
        kind, _, value = fault.partition(" ")
        if problem := self._problem(body):
            return problem
        if kind.isdigit():
            headers = {"Retry-After": value.removeprefix("after ")} if value else {}
            return *_error(int(kind), f"asked to fail with {kind}"), headers
        if kind == "html":
            return 200, "<html>a proxy's page</html>", {"Content-Type": "text/html"}
        if kind in ("silent", "trickle", "drop"):
            return self._stall(kind)
        return 200, self._completion(body, fault)

    def _problem(self, body: dict) -> tuple | None:
        server = self.server
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if server.key and given != server.key:
            return _error(401, f"Incorrect API key provided: {given}")
        if server.model and body["model"] != server.model:
            return _error(404, f"The model {body['model']} does not exist")
        for name in server.refused_options:
            if name in body:
                return _error(400, f"Unsupported parameter: '{name}' is not supported here.")
        return None

    def _completion(self, body: dict, fault: str) -> dict:
        content = json.dumps({"unknown": 1} if fault == "schema" else self.server.answer(body))
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if fault == "broken":
            message["content"] = content[: len(content) // 2]
        if fault == "fenced":
            message["content"] = f"<think>{{so}}</think>Here it is:\n```json\n{content}\n```"
        if fault == "refusal":
            message |= {"content": None, "refusal": "I will not."}
        reason = "length" if fault == "cut" else "stop"
        usage = {"prompt_tokens": 100, "completion_tokens": self.server.completion_tokens}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "choices": [choice]}
        return completion | ({} if fault == "no usage" else {"usage": usage})

    def _stall(self, kind: str) -> None:
        self.close_connection = True
        if kind != "silent":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{")
        while kind != "drop" and not self.server.closing.wait(0.02):
            self.wfile.write(b" " if kind == "trickle" else b"")

    def _send(self, status: int, body: dict | str, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _error(status: int, message: str) -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "error", "param": None, "code": None}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--key", help="the only key that is let in")
    parser.add_argument("--fault", help="what goes wrong with every tenth request, e.g. 500")
    args = parser.parse_args()

    def fault(number: int, body: dict) -> str | None:
        return args.fault if number % 10 == 0 else None

    server = Loopback(port=args.port, key=args.key, fault=fault)
    print(f"listening on {server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
