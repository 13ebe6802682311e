"""Bad servers: each ends in one message and an exit code, and the API key is in none of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvdrift.errors import CaptureError, EngineUnavailable, KvdriftError, UsageError
from kvdrift.server.client import Client, key_from_environment, server_root
from tests.support.command import kvdrift
from tests.support.serving import Engine, Reply, Vllm, serving, some_prompts

KEY = "sk-very-secret-1234567890"


def client(url: str, *, key: str | None = None, timeout_s: float = 5.0, max_requests: int = 20) -> Client:
    return Client(url, key=key, timeout_s=timeout_s, max_requests=max_requests, pause=lambda seconds: None)


def always(status: int, answer: Any, **headers: str) -> Callable[..., Reply]:
    return lambda *_: (status, {name.replace("_", "-"): value for name, value in headers.items()}, answer)


def asked(reply: Callable[..., Reply], **options: Any) -> tuple[Any, int]:
    """Return what GET gives or raises, and how many requests it took."""
    with serving(reply) as server, client(server.url, **options) as asking:
        try:
            return asking.get(f"{asking.api}/models"), asking.n_requests
        except KvdriftError as error:
            return error, asking.n_requests


@pytest.mark.parametrize(
    ("status", "answer", "error", "says"),
    [
        (401, {"error": {"message": "bad key"}}, EngineUnavailable, "set KVDRIFT_API_KEY"),
        (403, {"detail": "no"}, EngineUnavailable, "refuses"),
        (404, {"detail": "Not Found"}, EngineUnavailable, "check the address and --model"),
        (400, {"message": "odd"}, CaptureError, "does not accept"),
        (500, b"Internal Server Error", CaptureError, "look at its log"),
        (200, b"<html>hello</html>", CaptureError, "is not JSON"),
        (200, b'{"data": [', CaptureError, "is not JSON"),
        (307, b"", EngineUnavailable, "follows no redirect"),
    ],
)
def test_an_answer_that_will_not_get_better_is_asked_for_once(
    status: int, answer: Any, error: type[KvdriftError], says: str
) -> None:
    found, n_requests = asked(always(status, answer))

    assert type(found) is error
    assert says in str(found)
    assert n_requests == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again_and_then_given_up(status: int) -> None:
    found, n_requests = asked(always(status, {"error": "busy"}))

    assert isinstance(found, CaptureError)
    assert "too busy" in str(found)
    assert n_requests == 4


def test_a_server_that_recovers_is_no_error_and_its_retry_after_is_heeded() -> None:
    pauses: list[float] = []
    answers: Iterator[Reply] = iter(
        [(429, {"Retry-After": "7"}, {}), (503, {"Retry-After": "nonsense"}, {}), (200, {}, {"data": []})]
    )
    with (
        serving(lambda *_: next(answers)) as server,
        Client(server.url, key=None, timeout_s=5, max_requests=9, pause=pauses.append) as asking,
    ):
        assert asking.get(f"{asking.api}/models") == {"data": []}

    assert pauses[0] == 7.0
    assert 0.0 < pauses[1] <= 30.0


def test_retry_after_cannot_stall_the_audit() -> None:
    pauses: list[float] = []
    with (
        serving(always(429, {}, Retry_After="86400")) as server,
        Client(server.url, key=None, timeout_s=5, max_requests=9, pause=pauses.append) as asking,
        pytest.raises(CaptureError),
    ):
        asking.get(f"{asking.api}/models")
    assert pauses == [30.0, 30.0, 30.0]


def test_a_slow_server_times_out() -> None:
    def slow(*_: Any) -> Reply:
        time.sleep(0.6)
        return 200, {}, {}

    found, n_requests = asked(slow, timeout_s=0.1)

    assert isinstance(found, CaptureError)
    assert "within 0.1 s, 4 times" in str(found)
    assert n_requests == 4


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        client(f"http://127.0.0.1:{port}/v1") as asking,
        pytest.raises(EngineUnavailable, match="is the server running"),
    ):
        asking.get(f"{asking.api}/models")
    with (
        client(f"https://127.0.0.1:{port}/v1") as asking,
        pytest.raises(EngineUnavailable, match="is the server running"),
    ):
        asking.get(f"{asking.api}/models")


def test_https_towards_a_server_that_speaks_http_is_one_message() -> None:
    with serving(always(200, {})) as server:
        url = server.url.replace("http://", "https://")
        with client(url) as asking, pytest.raises(EngineUnavailable, match="cannot reach GET https://"):
            asking.get(f"{asking.api}/models")


def test_the_bound_on_requests_counts_retries() -> None:
    found, n_requests = asked(always(503, {}), max_requests=2)

    assert isinstance(found, CaptureError)
    assert "the bound of 2 requests is reached" in str(found)
    assert n_requests == 2


def test_a_redirect_does_not_take_the_key_elsewhere() -> None:
    with serving(always(200, {"data": []})) as elsewhere:
        found, _ = asked(always(302, b"", Location=elsewhere.url), key=KEY)
        assert isinstance(found, EngineUnavailable)
        assert elsewhere.seen == []


def test_the_key_is_sent_as_a_header_and_shown_nowhere() -> None:
    with serving(always(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})) as server:
        with client(server.url, key=KEY) as asking, pytest.raises(EngineUnavailable) as caught:
            asking.get(f"{asking.api}/models")
        (_, _, headers, _) = server.seen[0]

    assert headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)
    assert "[API key]" in str(caught.value)
    assert KEY not in repr(asking)


@pytest.mark.parametrize(
    "url",
    ["ftp://host/v1", "http://", "http:///v1", "http://host/v1?key=1", "http://host:port/v1", "http://user:pw@host/v1"],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        server_root(url)
    assert "pw" not in str(caught.value)


def test_the_key_comes_from_the_first_variable_that_holds_one() -> None:
    assert key_from_environment({}) is None
    assert key_from_environment({"OPENAI_API_KEY": "b"}) == "b"
    assert key_from_environment({"KVDRIFT_API_KEY": "a", "OPENAI_API_KEY": "b"}) == "a"
    with pytest.raises(UsageError, match="KVDRIFT_API_KEY holds characters") as caught:
        key_from_environment({"KVDRIFT_API_KEY": "line\nbreak"})
    assert "line" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"id": "{k}", "token_ids": {v}}}\n' for k, v in some_prompts(2).items()))
    return path


def altered(change: Callable[[dict[str, Any], Any], Any]) -> Callable[..., Reply]:
    """Return a vLLM whose completions are altered once it has been recognised."""
    inner = Vllm(Engine())

    def reply(method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        status, more, answer = inner(method, path, body, headers)
        if path.endswith("/completions") and "cache_salt" in body:
            changed = change(answer["choices"][0], body)
            answer = answer if changed is None else changed
        return status, more, answer

    return reply


def drop(name: str) -> Callable[[dict[str, Any], Any], None]:
    def change(choice: dict[str, Any], body: Any) -> None:
        choice.pop(name, None)

    return change


def fewer(choice: dict[str, Any], body: Any) -> None:
    if body.get("logprobs") == 2:
        choice["token_ids"].pop()


def null(choice: dict[str, Any], body: Any) -> None:
    if body.get("logprobs") == 2:
        choice["logprobs"]["token_logprobs"][1] = None


def other_ids(choice: dict[str, Any], body: Any) -> None:
    choice["prompt_token_ids"] = [1, *choice["prompt_token_ids"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("logprobs"), "has no choices[0].logprobs;"),
        (drop("token_ids"), "has no choices[0].token_ids;"),
        (drop("prompt_logprobs"), "has no choices[0].prompt_logprobs;"),
        (fewer, "not as many logprobs as tokens"),
        (null, "has null at choices[0].logprobs.token_logprobs[1],"),
        (other_ids, "changed the token ids"),
        (lambda choice, body: {"choices": []}, "has no choices[0]"),
        (lambda choice, body: [1, 2], "has no choices;"),
    ],
)
def test_an_answer_that_lacks_something_is_one_message(change: Any, says: str, prompts: Path, tmp_path: Path) -> None:
    with serving(altered(change)) as server:
        done = kvdrift("audit", server.url, "--prompts", prompts, "--span", "3", "--out", tmp_path / "run")

    assert done.code == 4
    assert says in done.err
    assert done.err.startswith("kvdrift: ")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_fewer_tokens_than_asked_are_counted_and_keep_it_from_passing(prompts: Path, tmp_path: Path) -> None:
    def short(choice: dict[str, Any], body: Any) -> None:
        if body.get("logprobs") == 2 and len(choice["token_ids"]) > 1:
            for column in (choice["token_ids"], *choice["logprobs"].values()):
                column.pop()

    with serving(altered(short)) as server:
        done = kvdrift(
            "audit", server.url, "--prompts", prompts, "--span", "5", "--dtype", "fp32", "--alpha", "0.9",
            "--out", tmp_path / "run",
        )  # fmt: skip

    assert done.code == 6
    assert "the server sent fewer tokens than asked" in " ".join(done.out.split())
    assert "TRACE_OFFSET" in (tmp_path / "run" / "report.md").read_text()


def test_a_wrong_model_name_lists_those_served(prompts: Path) -> None:
    with serving(Vllm(Engine())) as server:
        done = kvdrift("audit", server.url, "--model", "other", "--prompts", prompts)

    assert done.code == 2
    assert "does not serve 'other'; it serves: tiny" in done.err


def test_a_server_without_prompt_logprobs_is_told_apart(prompts: Path) -> None:
    def plain(method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        if path == "/v1/models":
            return 200, {}, {"data": [{"id": "gpt"}]}
        if path == "/v1/completions":
            return 200, {}, {"choices": [{"text": "x", "logprobs": {"token_logprobs": [-1.0]}}]}
        return 404, {}, {}

    with serving(plain) as server:
        done = kvdrift("audit", server.url, "--prompts", prompts)

    assert done.code == 3
    assert "prompt_logprobs" in done.err
    assert "return_token_ids" in done.err


@pytest.mark.parametrize(
    "option", [("--attn", "eager"), ("--layers", "0"), ("--lengths", "8"), ("--mode", "both"), ("--no-traces",)]
)
def test_an_option_that_reaches_into_an_engine_is_refused(option: tuple[str, ...]) -> None:
    done = kvdrift("audit", "http://127.0.0.1:9/v1", *option)

    assert done.code == 2
    assert f"{option[0]}" in done.err.replace("--traces/--no-traces", "--no-traces")


def test_an_option_of_a_server_is_refused_without_one() -> None:
    done = kvdrift("audit", "--max-requests", "5")

    assert done.code == 2
    assert "--max-requests is for a running server" in done.err


@pytest.mark.parametrize("given", [("--span", "1"), ("--max-requests", "0"), ("--timeout", "0"), ("--dtype", "int4")])
def test_an_option_out_of_range_is_refused(given: tuple[str, str]) -> None:
    assert kvdrift("audit", "http://127.0.0.1:9/v1", *given).code == 2


def test_the_key_is_in_no_output_and_no_file(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the server sends it back in every text that it controls."""
    monkeypatch.setenv("KVDRIFT_API_KEY", KEY)
    caplog.set_level("DEBUG")
    inner = Vllm(Engine())

    def leaking(method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        assert headers["Authorization"] == f"Bearer {KEY}"
        if path == "/version":
            return 200, {}, {"version": headers["Authorization"]}
        if path == "/v1/models":
            return 200, {}, {"data": [{"id": f"model-{KEY}"}]}
        return inner(method, path, body, headers)

    with serving(leaking) as server:
        done = kvdrift("audit", server.url, "--prompts", prompts, "--span", "3", "--out", tmp_path / "run")

    assert done.code == 6, done.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"report.json", "report.md", "report.html"}
    assert [path.name for path in files if KEY in path.read_text()] == []
    assert KEY not in done.out + done.err + caplog.text
    assert "[API key]" in (tmp_path / "run" / "report.md").read_text(), "the server's echo did not reach the report"


def test_the_report_says_what_logprobs_cannot_see(prompts: Path, tmp_path: Path) -> None:
    with serving(Vllm(Engine())) as server:
        done = kvdrift("audit", server.url, "--prompts", prompts, "--span", "3", "--out", tmp_path / "run")

    text = (tmp_path / "run" / "report.md").read_text()
    assert done.code == 6
    assert "### What logprobs cannot see" in text
    assert "Which tensor, layer or slot is wrong cannot be told from outside" in text
    assert "K3" in text
    assert "Drift by Position" in text
    assert (tmp_path / "run" / "report.json").is_file()
    assert kvdrift("show", "--markdown", tmp_path / "run").out == text
