"""llama.cpp's own server as it is released: clean ones pass whatever their settings, faults of decode are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvdrift.server.audit import ServerAudit, audit_server
from kvdrift.server.plan import ServerPlan
from kvdrift.server.values import FORCED, GENERATION
from kvdrift_bench.run.llama_server import started
from kvdrift_bench.run.server_faults import TWICE_FED, ServerFault, faulty, stale_slot, turned_back
from tests.support.llama_server import HEAD_DIM, ROPE_BASE, byte_prompts, tiny_with_text
from tests.support.serving import Engine, LlamaCpp, serving, some_prompts


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
        ("F32", {"n_parallel": 4, "kv_unified": True}),
        *(
            pytest.param(weights, settings, marks=pytest.mark.matrix)
            for weights, settings in (
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
    assert "With the prefix cache on" in audit.view["conclusion"]
    assert len(audit.view["coverage"]["prompts"]) == 12


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
