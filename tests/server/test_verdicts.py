"""Planted faults behind a real HTTP server are found, their routes named; clean twins stay quiet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvdrift.server.audit import ServerAudit, audit_server
from kvdrift.server.plan import ServerPlan
from tests.support.matrix import further
from tests.support.serving import Engine, LlamaCpp, Sglang, Vllm, serving, some_prompts

DECODES = {"decode_solo", "decode_repeat", "decode_warm", "decode_batched"}


def audited(engine: Engine, dialect: Any = Vllm, n_prompts: int = 12, **options: Any) -> ServerAudit:
    with serving(dialect(engine)) as server:
        return audit_server(server.url, ServerPlan(**options), prompts=some_prompts(n_prompts))


def failing(audit: ServerAudit) -> set[str]:
    return {result.route for result in audit.decision.routes if result.beyond}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "routes", "says"),
    [
        ("rope", DECODES, "every decode route"),
        *further(("stale", DECODES, "every decode route"), ("scaled", DECODES, "every decode route")),
        ("rows_past_boundary", DECODES, "from position 32 on"),
        ("prefix", {"decode_warm"}, "only decode on a warm prefix cache"),
        ("batch", {"decode_batched"}, "only decode with neighbours in flight"),
    ],
)
def test_a_planted_fault_is_a_mismatch_on_the_routes_that_meet_it(fault: str, routes: set[str], says: str) -> None:
    audit = audited(Engine(fault=fault), dtype="float32", span=12 if fault == "rows_past_boundary" else 6)

    assert audit.verdict == "MISMATCH"
    assert failing(audit) == routes
    assert audit.decision.diagnosis is not None
    assert says in audit.decision.diagnosis
    first = audit.decision.first_failure
    assert first is not None
    assert first.index >= 1


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("fault", ["rope", "prefix", "batch", "rows_past_boundary", "shifted"])
def test_a_gross_fault_is_a_mismatch_in_bfloat16_as_well(fault: str) -> None:
    assert audited(Engine(dtype=torch.bfloat16, fault=fault), dtype="bfloat16").verdict == "MISMATCH"


def test_a_scale_wrong_by_a_thousandth_is_seen_in_float32() -> None:
    audit = audited(Engine(fault="scaled", size=1.001), dtype="float32", span=6)

    assert audit.verdict == "MISMATCH"
    assert failing(audit) == DECODES


def test_displaced_logprobs_are_named_as_such() -> None:
    audit = audited(Engine(fault="shifted"), dtype="float32", span=16)

    assert audit.verdict == "MISMATCH"
    assert audit.decision.shift == 1
    assert "displaced by one token" in str(audit.decision.diagnosis)


def test_a_nan_among_the_logprobs_is_a_mismatch_at_its_token() -> None:
    audit = audited(Engine(fault="nan"), dtype="float32", span=4)

    assert audit.verdict == "MISMATCH"
    assert audit.decision.first_failure is not None
    assert (audit.decision.first_failure.prompt, audit.decision.first_failure.index) == ("p00", 3)
    assert '"nan"' in audit.to_json()


@pytest.mark.parametrize("dialect", [Vllm, Sglang])
@pytest.mark.parametrize("chunk", [*further(None), 16])
def test_a_clean_float32_server_is_structural_drift(dialect: Any, chunk: int | None) -> None:
    engine = Engine(chunk=chunk)
    audit = audited(engine, dialect, dtype="float32", span=6)

    assert audit.verdict == "STRUCTURAL_DRIFT"
    assert engine.largest_batch > 1, "nothing was batched, so the batched route says nothing"
    assert {r.route for r in audit.decision.routes} >= DECODES
    assert audit.decision.control is not None
    assert audit.decision.control.beyond
    assert audit.decision.minimum_detectable == pytest.approx(4e-5)


def test_sglang_tells_its_dtype_and_its_cache_hits() -> None:
    audit = audited(Engine(), Sglang, span=4)

    assert audit.verdict == "STRUCTURAL_DRIFT"
    assert audit.view["environment"]["dtype_from"] == "the server"
    assert audit.view["coverage"]["n_cached"]["decode_warm"] > 0
    assert audit.view["coverage"]["whole_prompts_computed"] is True


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_clean_bfloat16_server_passes_where_its_drift_is_far_below_what_a_pass_must_rule_out(
    chunk: int | None,
) -> None:
    """Its bound is 0.24 nats, but an error of 0.05 cannot hide in drift of 0.005."""
    audit = audited(Engine(dtype=torch.bfloat16, chunk=chunk), dtype="bfloat16", span=6)

    assert audit.verdict == "STRUCTURAL_DRIFT"
    assert audit.decision.minimum_detectable == 0.05
    assert audit.decision.control is not None
    assert audit.decision.control.bound == 0.05


def test_a_clean_bfloat16_server_is_inconclusive_with_its_power_where_a_pass_must_rule_out_less() -> None:
    audit = audited(Engine(dtype=torch.bfloat16), dtype="bfloat16", span=6, resolution=0.001)

    assert audit.verdict == "INCONCLUSIVE"
    assert failing(audit) == set()
    assert any("0.24 nats" in reason.text for reason in audit.decision.reasons)
    assert any("float32" in reason.remedy for reason in audit.decision.reasons)


def test_an_unknown_dtype_does_not_pass() -> None:
    audit = audited(Engine(), span=4)

    assert audit.verdict == "INCONCLUSIVE"
    assert any("--dtype" in reason.remedy for reason in audit.decision.reasons)
    assert any(caveat["code"] == "DTYPE_UNKNOWN" for caveat in audit.view["caveats"])


def test_too_few_prompts_do_not_pass() -> None:
    audit = audited(Engine(), n_prompts=4, dtype="float32", span=4)

    assert audit.verdict == "INCONCLUSIVE"
    assert any("4 prompts cannot reach alpha 0.001" in reason.text for reason in audit.decision.reasons)


@pytest.mark.parametrize("fault", [None, "rope"])
def test_llama_cpp_is_scored_one_token_a_request(fault: str | None) -> None:
    audit = audited(Engine(fault=fault), LlamaCpp, dtype="float32", span=17)

    assert audit.verdict == ("STRUCTURAL_DRIFT" if fault is None else "MISMATCH")
    assert {pair.index for pair in _solo(audit)} == {1, 2, 3, 6, 16}
    assert audit.view["coverage"]["whole_prompts_computed"] is True


@pytest.mark.parametrize("dialect", [Vllm, Sglang, LlamaCpp])
def test_a_text_becomes_the_ids_that_the_server_makes_of_it(dialect: Any) -> None:
    texts = {"a": "Once upon a time", "b": "def merge(left, right):"}
    with serving(dialect(Engine())) as server:
        audit = audit_server(server.url, ServerPlan(span=3), prompts=texts)

    assert {p["id"]: p["n_tokens"] for p in audit.view["coverage"]["prompts"]} == {k: len(v) for k, v in texts.items()}
    assert audit.verdict == "INCONCLUSIVE"


def _solo(audit: ServerAudit) -> list[Any]:
    pairs = [p for p in audit.view["pairs"] if p["route"] == "decode_solo" and p["index"] > 0]
    return [type("P", (), p) for p in pairs]


def test_the_bound_on_requests_holds_and_is_reported() -> None:
    with serving(Vllm(Engine())) as server:
        audit = audit_server(server.url, ServerPlan(dtype="float32", span=4, max_requests=60), prompts=some_prompts())
        assert len(server.seen) <= 60

    assert audit.verdict == "INCONCLUSIVE"
    assert any("prompts fit into 60 requests" in reason.text for reason in audit.decision.reasons)


def test_all_requests_sample_plainly() -> None:
    """K3 estimates KL for tokens sampled at temperature 1 only, so no filter and no penalty may be left on."""
    with serving(Vllm(Engine())) as server:
        audit_server(server.url, ServerPlan(span=2), prompts=some_prompts(2))
        sent = [body for method, path, _, body in server.seen if path == "/v1/completions"][3:]

    assert sent
    for body in sent:
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, 0, 0.0)
        assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    seeds = [body["seed"] for body in sent if body.get("logprobs") == 2]
    assert set(seeds) == {0, 1}


def test_cold_requests_never_share_a_salt() -> None:
    with serving(Vllm(Engine())) as server:
        audit_server(server.url, ServerPlan(span=2), prompts=some_prompts(2))
        salts = [body["cache_salt"] for _, _, _, body in server.seen if body and "cache_salt" in body]

    cold = [salt for salt in salts if salt.endswith("-cold")]
    assert len(cold) == len(set(cold))
    assert len(salts) - len(cold) == 4  # each prompt fills its own cache once, and reads it once
