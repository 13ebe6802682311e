"""llama.cpp's own server as it is released: clean ones pass whatever their settings, faults of decode are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvdrift.errors import UsageError
from kvdrift.server.audit import ServerAudit, audit_server
from kvdrift.server.plan import ServerPlan
from kvdrift.server.values import AGAINST, DECODE_BATCHED, DECODE_FEW, FORCED, GENERATION
from kvdrift_bench.run.llama_server import started
from kvdrift_bench.run.server_faults import TWICE_FED, ServerFault, faulty, stale_slot, turned_back
from tests.support.llama_server import HEAD_DIM, ROPE_BASE, byte_prompts, tiny_with_text
from tests.support.serving import Engine, LlamaCpp, Reply, serving, some_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def audited(url: str, **options: Any) -> ServerAudit:
    return audit_server(url, ServerPlan(**options), prompts=byte_prompts())


def generation(audit: ServerAudit) -> Any:
    return next(r for r in audit.decision.routes if r.route == GENERATION)


@pytest.mark.parametrize(
    ("weights", "settings"),
    [
        ("F32", {"n_parallel": 1}),
        ("Q4_1", {"n_parallel": 1}),
        ("Q4_1", {"n_parallel": 4, "kv_unified": True}),  # llama-server's own default
        *(
            pytest.param(weights, settings, marks=pytest.mark.matrix)
            for weights, settings in (
                ("F32", {"n_parallel": 4, "kv_unified": True}),
                ("Q4_1", {"n_parallel": 4, "kv_unified": False}),
                ("F32", {"n_parallel": 4, "n_ctx": 512}),
                ("Q8_0", {"n_parallel": 1}),
                ("F32", {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}),
                ("Q4_1", {"cache_type_k": "q4_0", "cache_type_v": "q4_0"}),
                ("F32", {"flash_attn": "disabled"}),
                ("F32", {"n_ubatch": 16}),
            )
        ),
    ],
)
def test_a_clean_server_is_no_mismatch_and_its_default_audit_fits(
    folder: Path, weights: str, settings: dict[str, Any]
) -> None:
    with started(tiny_with_text(folder, weights), **settings) as url:
        audit = audited(url)

    assert audit.verdict == "STRUCTURAL_DRIFT", audit.summary()
    assert audit.view["coverage"]["n_requests"] <= 300
    assert audit.view["environment"]["weights"] == ("all F32" if weights == "F32" else weights)
    assert generation(audit).within
    if settings.get("n_parallel", 1) > 1:
        (few,) = [r for r in audit.decision.routes if r.route == DECODE_FEW]
        assert few.within
        assert few.bound <= 0.05
        assert "beside a few neighbours" in audit.view["conclusion"]
    assert "With the prefix cache on" in audit.view["conclusion"]
    assert len(audit.view["coverage"]["prompts"]) == 12
    drifts = any(stretch["rms"] for stretches in audit.view["curve"].values() for stretch in stretches)
    if audit.view["curve_begins"] is not None and drifts:
        assert f"from {audit.view['curve_begins']}<" in audit.to_html()
        assert "bound " in audit.to_html()


@pytest.mark.parametrize(
    "fault",
    [
        TWICE_FED,
        ServerFault("stale slot in one of two layers", edit=stale_slot(0)),
        pytest.param(ServerFault("position", edit=turned_back(HEAD_DIM, ROPE_BASE)), marks=pytest.mark.matrix),
    ],
    ids=lambda fault: fault.name,
)
def test_what_decode_adds_to_a_step_is_found_and_told_from_rounding(
    fault: ServerFault, folder: Path, tmp_path: Path
) -> None:
    with faulty(tiny_with_text(folder, "Q4_1"), fault, tmp_path) as url:
        audit = audited(url)

    assert audit.verdict == "MISMATCH"
    assert generation(audit).beyond
    assert not next(r for r in audit.decision.routes if r.route == FORCED).beyond
    assert audit.decision.first_failure is not None
    assert audit.view["coverage"]["n_requests"] <= 300


@pytest.mark.parametrize(("factor", "verdict"), [(1.02, "INCONCLUSIVE"), (1.5, "MISMATCH")])
def test_an_error_beside_neighbours_does_not_hide_in_what_they_move_by_rounding(
    factor: float, verdict: str, folder: Path, tmp_path: Path
) -> None:
    """Less than a tenth of a nat is below the bound of a full batch; a few short prompts move nothing at all."""
    fault = ServerFault("logprobs scaled beside neighbours", beside=factor)
    with faulty(tiny_with_text(folder, "Q4_1"), fault, tmp_path, n_parallel=4, kv_unified=True) as url:
        audit = audited(url)

    assert audit.verdict == verdict, audit.summary()
    routes = {r.route: r for r in audit.decision.routes}
    assert not routes[DECODE_FEW].within
    assert not any(routes[name].beyond for name in ("decode_solo", "decode_repeat", "decode_warm", GENERATION))
    if verdict == "INCONCLUSIVE":
        assert not routes[DECODE_BATCHED].beyond
        assert audit.decision.minimum_detectable is not None
        assert audit.decision.minimum_detectable <= 0.05
        assert any("few neighbours" in reason.text for reason in audit.decision.reasons)


def test_saving_and_restoring_rows_alone_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """Faults are planted by way of a file; this twin takes the same way."""
    none = ServerFault("none", edit=lambda keys, values: None)
    with faulty(tiny_with_text(folder, "Q4_1"), none, tmp_path) as url:
        assert audited(url).verdict == "STRUCTURAL_DRIFT"


def test_a_server_that_cannot_go_on_from_its_cache_says_so() -> None:
    with serving(LlamaCpp(Engine(), goes_on=False)) as server:
        audit = audit_server(server.url, ServerPlan(span=6), prompts=some_prompts())

    assert GENERATION not in {r.route for r in audit.decision.routes}
    assert any("--cache-prompt" in caveat["text"] for caveat in audit.view["caveats"])
    assert audit.verdict != "MISMATCH"


def test_a_cache_of_fewer_bits_than_claimed_is_found_beside_a_server_as_claimed(folder: Path) -> None:
    model = tiny_with_text(folder, "Q4_1")
    with started(model) as claimed, started(model) as same, started(model, cache_type_k="q4_0") as other:
        clean, faulty = audited(same, against=claimed), audited(other, against=claimed)

    assert clean.verdict == "STRUCTURAL_DRIFT", clean.summary()
    assert faulty.verdict == "MISMATCH"
    assert {r.route for r in faulty.decision.routes if r.beyond} == {AGAINST}
    assert "does not compute what the other server computes" in faulty.view["conclusion"]
    assert "--cache-type-k" in str(faulty.decision.diagnosis)


def test_the_other_server_must_be_of_the_same_model_and_gets_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVDRIFT_API_KEY", "sk-of-the-first-server")
    one, two = LlamaCpp(Engine()), LlamaCpp(Engine())

    def longer(method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        status, more, answer = two(method, path, body, headers)
        return status, more, {"tokens": [*answer["tokens"], 3]} if path == "/tokenize" else answer

    with serving(one) as first, serving(longer) as second:
        with pytest.raises(UsageError, match="cuts the prompt 'a' into other tokens"):
            audit_server(first.url, ServerPlan(span=2, against=second.url), prompts={"a": "Once upon", "b": "a time"})

        assert all("Authorization" in headers for _, _, headers, _ in first.seen)
        assert not any("Authorization" in headers for _, _, headers, _ in second.seen)
