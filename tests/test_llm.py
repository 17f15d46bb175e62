"""The client against a server that misbehaves."""

import asyncio
import json
import logging
import socket
import traceback
from pathlib import Path

import pytest
from pydantic import BaseModel

from lib.data.llm import STOP_AFTER, BudgetExceeded, EndpointError, Failure, Llm, LlmConfig, Request
from tests.loopback import Loopback, isolate, kill_after, question

KEY = "sk-loopback-0123456789-secret"
WRONG_KEY = "sk-wrong-key-9876543210"


class Echo(BaseModel, extra="forbid"):
    word: str


def echo(body: dict) -> dict:
    return {"word": question(body)["word"]}


def ask_for(word: object) -> Request:
    content = f"Say the word.\n{json.dumps({'word': str(word)})}"
    return Request(prompt=content, answer=Echo)


def ask(llm: Llm, words) -> list:
    """The word of each answer, or its failure."""
    answers = llm.ask([ask_for(word) for word in words])
    return [answer.word if isinstance(answer, Echo) else answer for answer in answers]


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)


def client(server: Loopback, tmp_path: Path, **settings) -> Llm:
    return Llm(LlmConfig(**server.settings(tmp_path, **settings)))


def test_answers_in_order_and_equal_requests_are_asked_once(tmp_path):
    asked = ["a", "b", "a", "c", "b"]
    with Loopback(answer=echo) as server:
        llm = client(server, tmp_path)
        assert ask(llm, asked) == asked
        assert len(server.bodies) == llm.usage.requests == 3
        assert llm.usage.input_tokens == 300
        again = client(server, tmp_path)
        assert ask(again, asked) == asked
        assert len(server.bodies) == 3
    assert (again.usage.cached, again.usage.requests) == (3, 0)
    assert ask(again, []) == []


def test_works_inside_a_running_event_loop(tmp_path):
    async def notebook_cell() -> list:
        return ask(client(server, tmp_path), "a")

    with Loopback(answer=echo) as server:
        assert asyncio.run(notebook_cell()) == ["a"]


def test_what_is_sent_states_schema_limit_and_temperature(tmp_path):
    with Loopback(answer=echo) as server:
        ask(client(server, tmp_path, extra_output_tokens=100), "a")
        (body,) = server.bodies
    assert (body["max_tokens"], body["temperature"]) == (612, 0)
    assert body["response_format"]["json_schema"]["schema"] == Echo.model_json_schema()
    assert json.dumps(Echo.model_json_schema()) in body["messages"][-1]["content"]


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "broken", "schema", "html"])
def test_a_fault_is_asked_again(tmp_path, fault):
    with Loopback(answer=echo, fault=lambda number, body: fault if number <= 2 else None) as server:
        assert ask(client(server, tmp_path), "a") == ["a"]
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "n_asked", "kept", "reason"),
    [
        ("429", 3, False, "asked to fail with 429"),
        ("500", 3, False, "asked to fail with 500"),
        ("drop", 3, False, "Connection error"),
        ("silent", 3, False, "timed out"),
        ("trickle", 1, False, "timed out"),
        ("broken", 3, True, "not valid"),
        ("schema", 3, True, "word: Field required"),
        ("html", 3, False, "not valid"),
        ("400", 1, False, "asked to fail with 400"),
        ("refusal", 1, True, "refused: I will not."),
        ("cut", 1, False, "cut at 512 tokens"),
    ],
)
def test_a_fault_that_stays_fails_its_item_only(tmp_path, fault, n_asked, kept, reason):
    """What was answered, even badly, is not asked again; what was not answered is."""

    def is_b(body: dict) -> bool:
        return question(body)["word"] == "b"

    settings = {"timeout": 0.3} if fault == "trickle" else {}
    with Loopback(answer=echo, fault=lambda n, body: fault if is_b(body) else None) as server:
        a, failure, c = ask(client(server, tmp_path, **settings), "abc")
        assert (a, c) == ("a", "c")
        assert isinstance(failure, Failure) and reason in failure.reason
        assert sum(map(is_b, server.bodies)) == n_asked
        assert ask(client(server, tmp_path, **settings), "b") == [failure]
        assert sum(map(is_b, server.bodies)) == n_asked * (1 if kept else 2)


def test_a_real_server_that_stays_silent_is_asked_again(tmp_path):
    """Over a socket, where it is httpx that loses patience."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = {"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"}
        (failure,) = ask(client(Loopback(), tmp_path, **where, timeout=0.3), "b")
        listener.settimeout(0)
        sent = [listener.accept()[0].recv(99).split()[:2] for _ in range(3)]
        with pytest.raises(BlockingIOError):  # and no fourth time
            listener.accept()
    assert isinstance(failure, Failure) and "timed out" in failure.reason
    assert sent == [[b"POST", b"/v1/chat/completions"]] * 3


def test_an_invalid_answer_is_told_what_was_wrong(tmp_path):
    with Loopback(answer=echo, fault=lambda n, body: "schema" if n == 1 else None) as server:
        ask(client(server, tmp_path), "a")
        wrong, told = server.bodies[1]["messages"][1:]
    assert wrong == {"role": "assistant", "content": '{"unknown": 1}'}
    assert "word: Field required" in told["content"]


def test_fences_thoughts_and_missing_usage_are_taken(tmp_path):
    faults = {1: "fenced", 2: "no usage"}
    with Loopback(answer=echo, fault=lambda number, body: faults.get(number)) as server:
        llm = client(server, tmp_path)
        assert ask(llm, "ab") == ["a", "b"]
        assert len(server.bodies) == 2
    assert llm.usage.input_tokens > 100
    assert llm.usage.output_tokens > 10


def test_retry_after_is_honoured(tmp_path, monkeypatch):
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("anyio.sleep", sleep)
    with Loopback(answer=echo, fault=lambda n, body: "429 after 90" if n == 1 else None) as server:
        assert ask(client(server, tmp_path), "a") == ["a"]
    assert waits == [90]


def test_concurrency_reaches_its_limit_and_never_passes_it(tmp_path):
    five = asyncio.Barrier(5)  # nothing is answered until five are in flight; the first is alone

    async def gather(number: int, body: dict) -> None:
        if number > 1:
            await five.wait()

    with Loopback(answer=echo, fault=gather) as server:
        ask(client(server, tmp_path, max_concurrency=5), range(21))
        assert (server.most_in_flight, len(server.bodies)) == (5, 21)


@pytest.mark.parametrize("options", [("response_format",), ("temperature", "max_tokens")])
def test_an_option_that_the_server_refuses_is_left_out(tmp_path, options):
    with Loopback(answer=echo, refused_options=options) as server:
        assert ask(client(server, tmp_path), range(20)) == [str(i) for i in range(20)]
        assert len(server.bodies) == 20 + len(options)  # each refused once, not once a worker
        last = server.bodies[-1]
    assert last.keys().isdisjoint(options)
    assert {last.get("max_tokens"), last.get("max_completion_tokens")} == {None, 512}


def revoke(number: int, body: dict) -> str | None:
    return "401" if number > 10 else None


@pytest.mark.parametrize(
    ("server", "settings", "says", "n_sent"),
    [
        ({"key": KEY}, {}, "wrong key", range(1, 2)),
        ({"model": "other"}, {}, "no such model", range(1, 2)),
        ({"fault": revoke}, {}, "wrong key", range(11, 15)),
        ({"fault": lambda *_: "402"}, {}, "no credit", range(1, 2)),
        ({"fault": lambda *_: "500"}, {"max_retries": 0}, "in a row", range(10, 15)),
    ],
)
def test_what_stops_a_job(tmp_path, monkeypatch, server, settings, says, n_sent):
    monkeypatch.setenv("OPENAI_API_KEY", WRONG_KEY)
    with Loopback(answer=echo, **server) as server:
        with pytest.raises(EndpointError, match=says) as caught:
            ask(client(server, tmp_path, **settings), range(60))
        assert len(server.bodies) in n_sent
    assert WRONG_KEY not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


def test_failures_that_are_not_in_a_row_do_not_stop_the_job(tmp_path):
    with Loopback(answer=echo, fault=lambda number, body: "400" if number % 2 else None) as server:
        answers = ask(client(server, tmp_path, max_concurrency=1), range(2 * STOP_AFTER + 2))
    assert sum(isinstance(answer, Failure) for answer in answers) == STOP_AFTER + 1


def test_estimate_over_budget_is_refused_before_any_request(tmp_path):
    prices = {"usd_per_million_input": 10.0, "usd_per_million_output": 1000.0}
    with Loopback(answer=echo) as server:
        llm = client(server, tmp_path, budget_usd=1.0, **prices)
        with pytest.raises(BudgetExceeded, match=r"2 requests .*1\.0\d+ USD.*budget is 1\.0000"):
            ask(llm, "aba")
        assert server.bodies == []
        ask(llm, "a")
        assert llm.usage.usd == pytest.approx((100 * 10 + 10 * 1000) / 1e6)
        free = client(server, tmp_path, budget_usd=0.0, **prices)
        assert ask(free, "a") == ["a"]  # the cache costs nothing
    assert free.usage.usd_cached == llm.usage.usd


def test_the_job_stops_when_usage_would_pass_the_budget(tmp_path):
    prices = {"usd_per_million_input": 0.0, "usd_per_million_output": 1000.0}
    with Loopback(answer=echo, completion_tokens=2000) as server:
        llm = client(server, tmp_path, budget_usd=16.0, **prices)
        with pytest.raises(BudgetExceeded, match="what was answered is in the cache"):
            ask(llm, range(30))
        n_sent = len(server.bodies)
    assert 5 <= n_sent <= 8  # 2 USD each, where the estimate said about 0.5
    assert llm.usage.usd == pytest.approx(2.0 * n_sent)
    assert (tmp_path / "cache" / "answers.jsonl").read_text().count("\n") == n_sent


@pytest.mark.parametrize("escaped", [False, True])
def test_the_key_appears_nowhere(tmp_path, monkeypatch, caplog, capfd, escaped):
    """Not even where the server sends it back in answers, refusals and errors."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    faults = {2: "400", 3: "schema", 4: "broken"}
    dumps = json.dumps

    def leak(body: dict) -> dict:
        return {"word": f"{question(body)['word']} {KEY}"}

    def escape(*args, **kwargs) -> str:
        return dumps(*args, **kwargs).replace(KEY, rf"\u0073{KEY[1:]}")

    if escaped:
        monkeypatch.setattr("tests.loopback.json.dumps", escape)
    with Loopback(answer=leak, key=KEY, fault=lambda n, body: faults.get(n)) as server:
        llm = client(server, tmp_path)
        answers = ask(llm, range(8))
    seen = [repr(answers), repr(llm), repr(vars(llm)), caplog.text, *capfd.readouterr()]
    seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert answers[0] == "0 <key>"
    assert not [text for text in seen if KEY in text]


def test_a_short_placeholder_key_does_not_garble_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Loopback(answer=echo) as server:
        assert ask(client(server, tmp_path), ["none"]) == ["none"]


def test_key_and_address_come_from_dotenv_and_environment_wins(tmp_path, monkeypatch):
    config = LlmConfig(model="m", usd_per_million_input=0.0, usd_per_million_output=0.0)
    with pytest.raises(ValueError, match=r"no key for https://api\.openai\.com/v1"):
        Llm(config)
    with Loopback(answer=echo, key=KEY) as server:
        (tmp_path / ".env").write_text(f"OPENAI_API_KEY={KEY}\nOPENAI_BASE_URL={server.url}\n")
        assert ask(Llm(config), "a") == ["a"]
    assert (tmp_path / "data" / "llm_cache" / "answers.jsonl").exists()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.2:1/v1/")
    assert Llm(config).base_url == "http://127.0.0.2:1/v1"


@pytest.mark.parametrize(
    "settings",
    [
        {"model": " "},
        {"max_concurrency": 0},
        {"max_retries": -1},
        {"budget_usd": float("nan")},
        {"budget_usd": -1.0},
        {"usd_per_million_input": float("inf")},
        {"timeout": 0.0},
        {"time_out": 1.0},
    ],
)
def test_impossible_configs(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name}\n.*input_value={value!r}"):
        LlmConfig(**{"model": "m"} | settings)


@pytest.mark.parametrize(
    ("key", "settings", "says"),
    [
        (KEY, {"usd_per_million_output": 1.0}, "need usd_per_million_input"),
        (f"{KEY}\nX", {"base_url": "http://127.0.0.1:1/v1"}, "characters that no key has"),
        (KEY, {"base_url": "localhost:8000"}, "need base_url like"),
        (KEY, {"base_url": "ftp://x/v1"}, "need base_url like"),
        (KEY, {"base_url": f"https://u:{KEY}@x/v1"}, "need base_url like"),
        (KEY, {"base_url": "//x"}, "need base_url like"),
    ],
)
def test_an_impossible_server_or_key_is_refused_and_no_secret_repeated(
    monkeypatch, key, settings, says
):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=says) as caught:
        Llm(LlmConfig(model="m", **settings))
    assert KEY not in str(caught.value)


def test_a_torn_last_line_is_skipped_with_a_warning(tmp_path):
    with Loopback(answer=echo) as server:
        ask(client(server, tmp_path), "ab")
        path = tmp_path / "cache" / "answers.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        for _ in range(2):
            with pytest.warns(UserWarning, match="skipped a damaged line"):
                assert ask(client(server, tmp_path), "abc") == [*"abc"]
            assert len(server.bodies) == 4


def test_an_unwritable_cache_is_refused_before_any_request(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with Loopback(answer=echo) as server:
        with pytest.raises(OSError, match="cannot write in"):
            client(server, tmp_path)
        assert server.bodies == []


def test_resume_after_kill_asks_nothing_twice(tmp_path):
    with Loopback(answer=echo) as server:

        def job() -> None:
            assert ask(client(server, tmp_path), range(40)) == [str(i) for i in range(40)]

        kill_after(15, server, job, tmp_path / "cache" / "answers.jsonl")
        job()
        assert len(server.bodies) == 40 - 15
