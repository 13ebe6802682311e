"""Servers behind a gateway that limits, replaces, delays or cuts answers: one message, or an audit that says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvdrift.errors import CaptureError
from kvdrift.server.audit import ServerAudit, audit_server
from kvdrift.server.plan import ServerPlan
from tests.support.command import kvdrift
from tests.support.gateway import HTML, Policy, Trouble, gateway
from tests.support.serving import Engine, LlamaCpp, Reply, Server, Vllm, serving, some_prompts

PROMPTS = some_prompts(3)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Vllm(Engine())) as found:
        yield found


def audited(server: Server, policy: Policy, pauses: list[float] | None = None, **options: Any) -> ServerAudit:
    """Audit a clean server through a gateway; alpha is one that three prompts can reach."""
    plan = ServerPlan(**{"span": 4, "dtype": "float32", "alpha": 0.6, **options})
    with gateway(server.url, policy) as url:
        return audit_server(url, plan, prompts=PROMPTS, pause=(pauses if pauses is not None else []).append)


def every_third(trouble: Trouble) -> Policy:
    return lambda number: trouble if number % 3 == 1 else None


@pytest.mark.parametrize(
    ("trouble", "pause"),
    [
        (Trouble(status=429, headers={"Retry-After": "3"}), 3.0),
        (Trouble(status=429), None),
        (Trouble(status=502), None),
        (Trouble(status=504), None),
        (Trouble(share=0.6), None),
    ],
    ids=["429 with Retry-After", "429 without", "502 in HTML", "504 in HTML", "truncated"],
)
def test_what_passes_by_itself_is_asked_for_again_and_changes_no_figure(
    server: Server, trouble: Trouble, pause: float | None
) -> None:
    pauses: list[float] = []
    clean, troubled = audited(server, lambda _: None), audited(server, every_third(trouble), pauses)

    assert troubled.verdict == clean.verdict == "STRUCTURAL_DRIFT", troubled.summary()
    alone = [[p for p in audit.view["pairs"] if p["route"] == "decode_solo"] for audit in (clean, troubled)]
    assert [p["token"] for p in alone[0]] == [p["token"] for p in alone[1]]
    # A request whose answer was cut was computed once before, so that the second answer may be one of a warm cache.
    assert [p["value"] for p in alone[0]] == pytest.approx([p["value"] for p in alone[1]], abs=1e-5)
    assert troubled.view["coverage"]["n_requests"] > clean.view["coverage"]["n_requests"]
    assert pauses
    assert all(0.0 < found <= 30.0 for found in pauses)
    assert pause is None or set(pauses) == {pause}


def test_a_slow_answer_in_time_is_an_answer_and_one_that_trickles_is_not(server: Server) -> None:
    slow, trickling = Trouble(trickle_s=0.02), Trouble(trickle_s=0.2)
    assert audited(server, lambda number: slow if number < 4 else None, timeout_s=20.0).verdict == "STRUCTURAL_DRIFT"
    with pytest.raises(CaptureError, match=r"no answer to POST .* within 0.5 s, 4 times; give it longer \(--timeout"):
        audited(server, lambda number: trickling if number > 1 else None, timeout_s=0.5)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (Trouble(status=429), "the server was too busy for POST"),
        (Trouble(status=429, headers={"Retry-After": "1"}), "the server was too busy for POST"),
        (Trouble(status=200), "is not JSON"),
        (Trouble(status=403), "set KVDRIFT_API_KEY"),
        (Trouble(share=0.5), "broke off, 4 times"),
    ],
    ids=["429", "429 with Retry-After", "HTML in place of an answer", "HTML that refuses", "truncated"],
)
def test_a_gateway_that_stays_in_the_way_is_one_message(
    server: Server, tmp_path: Path, trouble: Trouble, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdrift.server.client._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("kvdrift.server.client._LONGEST_PAUSE_S", 0.01)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"id": "{name}", "token_ids": {ids}}}\n' for name, ids in PROMPTS.items()))
    with gateway(server.url, lambda number: trouble if number > 2 else None) as url:
        done = kvdrift("audit", url, "--prompts", path, "--span", "4", "--out", tmp_path / "run")

    assert done.code in (3, 4)
    assert says in done.err
    assert done.err.startswith("kvdrift: ")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_route_that_the_gateway_breaks_keeps_the_audit_from_passing(server: Server) -> None:
    """The first routes are answered; what cannot be had later is named and no pass is given without it."""
    first = audited(server, lambda _: None)
    n_first = 2 * len(PROMPTS) + 4  # generations and scores, and the requests that recognise the server
    broken = audited(server, lambda number: Trouble(status=500, body=HTML) if number > n_first else None)

    assert first.verdict == "STRUCTURAL_DRIFT"
    assert broken.verdict == "INCONCLUSIVE"
    failures = broken.view["coverage"]["failures"]
    assert "decode_warm" in failures
    assert all("the server failed at POST" in text for text in failures.values())


def llama_cpp(change: Any) -> Any:
    """A llama-server whose answers to generations are changed."""
    inner = LlamaCpp(Engine())

    def reply(method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        status, more, answer = inner(method, path, body, headers)
        if path == "/completion" and body["n_predict"] > 1:
            change(answer)
        return status, more, answer

    return reply


def test_ids_that_the_server_tells_in_two_ways_are_no_pair() -> None:
    """Sampler and logprobs of one answer disagree about a token."""

    def other(answer: Any) -> None:
        answer["tokens"][2] += 1

    with serving(llama_cpp(other)) as found, pytest.raises(CaptureError, match="gives token 2 two ids"):
        audit_server(found.url, ServerPlan(span=6), prompts=PROMPTS)
    with serving(llama_cpp(lambda answer: None)) as found:
        assert audit_server(found.url, ServerPlan(span=6), prompts=PROMPTS).verdict != "MISMATCH"


def test_a_server_that_cuts_the_prompt_otherwise_than_it_says_is_refused() -> None:
    """The ids that were sent are not those that were computed: a text was cut again."""
    inner = Vllm(Engine())

    def reply(method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        status, more, answer = inner(method, path, body, headers)
        if path == "/v1/completions" and body.get("prompt_logprobs") is not None and "cache_salt" in body:
            answer["choices"][0]["prompt_token_ids"][1] += 1
        return status, more, answer

    with serving(reply) as found, pytest.raises(CaptureError, match="changed the token ids"):
        audit_server(found.url, ServerPlan(span=4), prompts=PROMPTS)
