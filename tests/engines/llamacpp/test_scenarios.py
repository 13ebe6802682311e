"""Other routes to a token in llama.cpp: each passes on a clean model, and each finds what only it can find."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role, cache_layer
from kvdrift.pipeline.audit import Audit, audit_engine
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf
from tests.support.matrix import further
from tests.support.neighbours import SeesItsNeighbours

PROMPTS = {"a": (3, 9, 17, 22, 41, 7, 60, 12, 33), "b": (5, 80, 2)}
RUN = {
    "decode", "chunked_prefill", "verify", "rewind", "rewind_edge", "draft_rounds", "second_call", "shorter_call",
    "prefix_reuse", "export_import", "context_shift", "batch", "duplicate_rows", "last_positions",
}  # fmt: skip
RING = 256  # cells of a window of 6 tokens and 32 that are fed at once


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def model(models: Path, kind: str, n_positions: int = 128) -> Path:
    path = models / f"{kind}-{n_positions}.gguf"
    return path if path.exists() else write_tiny_gguf(path, kind, n_positions=n_positions)


def audit(path: Path, wanted: str, fault: Faultless | None = None, **options: Any) -> Audit:
    with LlamaCppEngine(path, threads=1, fault=fault, **options) as engine:
        return audit_engine(engine, AuditPlan(span=2), PROMPTS, engine.encode, out=None, scenarios=wanted)


def verdicts(found: Audit) -> dict[str, str | None]:
    """The verdict by scenario, None where it could not run."""
    return {row["name"]: row["verdict"] for row in found.view["scenarios"]}


def has_passed(found: Audit) -> bool:
    return {verdict for verdict in verdicts(found).values() if verdict is not None} <= {"STRUCTURAL_DRIFT", "EXACT"}


@pytest.mark.parametrize(("kind", "more"), [("llama", set()), *further(("gemma2", {"window_edge"}))])
def test_other_routes_to_a_token_pass(models: Path, kind: str, more: set[str]) -> None:
    found = audit(model(models, kind), "all")
    assert {name for name, verdict in verdicts(found).items() if verdict is not None} == RUN | more
    assert has_passed(found), verdicts(found)


@pytest.mark.parametrize("kind", ["gpt2", *further("smollm3")])
def test_a_route_has_a_positive_control_where_no_query_is_rotated(models: Path, kind: str) -> None:
    """Where nothing but the projection makes the queries, the fault is planted behind attention."""
    path = write_tiny_gguf(models / f"{kind}-4.gguf", kind, n_layers=4)
    found = audit(path, "verify,rewind")
    assert verdicts(found) == {"verify": "STRUCTURAL_DRIFT", "rewind": "STRUCTURAL_DRIFT"}, found.decision.reasons


@pytest.mark.parametrize(
    ("kind", "layer", "cause"),
    # docs/findings/llamacpp_moved_keys.md
    [("smollm3", 3, "rope_position_offset_k"), ("hunyuan-dense", 0, None)],
)
def test_moved_keys_that_were_not_rotated_last_are_wrong(
    models: Path, kind: str, layer: int, cause: str | None
) -> None:
    path = write_tiny_gguf(models / f"{kind}-4.gguf", kind, n_layers=4)
    found = audit(path, "decode,context_shift")
    assert verdicts(found) == {"decode": "STRUCTURAL_DRIFT", "context_shift": "MISMATCH"}
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.site) == (layer, Site.K_CACHE), found.first_failure
    (row,) = [row for row in found.view["scenarios"] if row["name"] == "context_shift"]
    assert cause in (None, row["diagnosis"]["cause"]), row


def test_the_finding_of_moved_keys_is_what_its_script_shows() -> None:
    page = Path(__file__).parents[3] / "docs" / "findings" / "llamacpp_moved_keys.md"
    # In a process of its own: the script silences the library.
    done = subprocess.run([sys.executable, page.with_suffix(".py")], capture_output=True, text=True, check=True)

    shown = re.findall(r"differ by (\S+)", done.stdout)
    assert [float(figure) > 1e-2 for figure in shown] == [False, True, True, True]
    assert all(f"| {figure} |" in page.read_text() for figure in shown)


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("gpt-oss", marks=pytest.mark.matrix)])
def test_a_ring_that_is_written_again_passes(models: Path, kind: str) -> None:
    found = audit(model(models, kind, 512), "ring_cache")
    assert verdicts(found) == {"ring_cache": "STRUCTURAL_DRIFT"}, found.first_failure


def goes_around_512(largest: int, call: Fed) -> bool:
    """Whether a call writes behind the last cell of a ring of 512."""
    return call.members[0][1] >= 512


@pytest.mark.matrix
def test_a_ring_of_more_than_256_cells_is_gone_around(models: Path) -> None:
    """A window of 300 tokens and 32 that are fed at once take 512 cells; no prompt is that long."""
    path = write_tiny_gguf(models / "wide-window.gguf", "gemma2", n_positions=600, window=300)
    clean = audit(path, "ring_cache")
    assert verdicts(clean) == {"ring_cache": "STRUCTURAL_DRIFT"}, clean.first_failure
    found = audit(path, "ring_cache", StaleRow(0, goes_around_512))
    assert verdicts(found) == {"ring_cache": "MISMATCH"}
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.site) == (0, Site.K_CACHE), found.first_failure


def test_a_ring_that_no_prompt_goes_around_says_what_it_needs(models: Path) -> None:
    path = write_tiny_gguf(models / "huge-window.gguf", "gemma2", n_positions=4096, window=2000)
    (row,) = [row for row in audit(path, "draft_rounds,ring_cache").view["scenarios"] if row["name"] == "ring_cache"]
    assert row["verdict"] is None
    assert "needs 2052 tokens" in "; ".join(row["reasons"])


def test_what_cannot_be_is_said(models: Path) -> None:
    """No window, no rotation, packed keys that llama.cpp ends the process over."""
    reasons = {}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("llama", "ring_cache", {}),
        ("gpt2", "context_shift", {}),
        ("llama", "context_shift", {"kv_type": "q8_0", "flash": True}),
    ]
    for kind, wanted, options in cases:
        found = audit(model(models, kind), f"draft_rounds,{wanted}", **options)
        (row,) = [row for row in found.view["scenarios"] if row["name"] == wanted]
        reasons[kind, wanted, bool(options)] = "; ".join(row["reasons"])
    assert reasons["llama", "ring_cache", False] == "no layer has a sliding window"
    assert "shows no rotation of queries" in reasons["gpt2", "context_shift", False]
    assert "cannot turn keys packed as q8_0 whose heads are 32 wide" in reasons["llama", "context_shift", True]


def test_packed_keys_are_moved(models: Path) -> None:
    """They are unpacked, turned and packed again, heads of 64 multiplied by a matrix in between."""
    path = write_tiny_gguf(models / "wide.gguf", "llama", head_width=64)
    found = audit(path, "context_shift", kv_type="q8_0", flash=True)
    assert verdicts(found) == {"context_shift": "STRUCTURAL_DRIFT"}, found.first_failure


# ------------------------------------------------------------------------------------------------------ planted faults


class MovedTooFar(Faultless):
    """Keys are turned by one position more than their tokens are moved by."""

    def before(self, node: Tensor, call: Fed) -> None:
        cached, distances = node.source(0), node.source(1)
        if node.op == "ROPE" and cached is not None and distances is not None and cache_layer(cached) == 0:
            values = distances.values()
            values[values != 0] -= 1


class TurnedByAnotherBase(Faultless):
    """The graph that turns moved keys does so with another base of the rotation in layer 1."""

    def before(self, node: Tensor, call: Fed) -> None:
        source = node.source(0)
        if node.op == "ROPE" and source is not None and cache_layer(source) == 1:
            parameters = node.struct.op_params
            parameters[5] = int((np.float32(2.0) * np.int32(parameters[5]).view(np.float32)).view(np.int32))


WAYS = ("state", "state of one sequence", "file", "file of one sequence")


@dataclass
class LostTail(Faultless):
    """The last bytes of a saved state, values of the last layer, are read back as zeros, in one way of four."""

    way: str
    _n_saved: int = 0

    def loading(self, state: bytes) -> bytes:
        self._n_saved += 1
        return state[:-64] + bytes(64) if WAYS[(self._n_saved - 1) % 4] == self.way else state


class OtherSequence(Faultless):
    """A branch is a copy of a sequence that holds nothing."""

    def copying(self, sequence: int) -> int:
        return sequence + 1


@dataclass
class StaleRow(Faultless):
    """In some calls the first fed token does not write its own key in a layer: what was there before stays."""

    layer: int
    wanted: Callable[[int, Fed], bool]
    largest: int = -1
    _kept: Any = field(default=None, repr=False)
    _hit: bool = False

    def starting(self, cache: Any, call: Fed) -> None:
        self._hit = self.wanted(self.largest, call)
        self.largest = max(self.largest, call.members[-1][1]) if call.members[0][1] else call.members[-1][1]

    def before(self, node: Tensor, call: Fed) -> None:
        cells = node.source(1) if self._hit and node.op == "SET_ROWS" else None
        if cells is not None and node.name.startswith(f"cache_k_l{self.layer}"):
            self._kept = node.values()[0, 0, int(cells.values().ravel()[0])].copy()

    def after(self, node: Tensor, role: Role | None, call: Fed) -> None:
        cells = node.source(1) if self._kept is not None and node.op == "SET_ROWS" else None
        if cells is not None and node.name.startswith(f"cache_k_l{self.layer}"):
            node.values()[0, 0, int(cells.values().ravel()[0])] = self._kept
            self._kept = None


def comes_back(largest: int, call: Fed) -> bool:
    """Whether a call of several tokens writes where dropped tokens were."""
    return len(call.members) > 1 and 0 < call.members[0][1] <= largest


def goes_around(largest: int, call: Fed) -> bool:
    """Whether a call writes behind the last cell of a ring."""
    return call.members[0][1] >= RING


@pytest.mark.parametrize(
    ("kind", "scenario", "fault", "layer", "sites"),
    [
        ("llama", "context_shift", MovedTooFar(), 0, {Site.K_CACHE}),
        *further(("llama", "context_shift", TurnedByAnotherBase(), 1, {Site.K_CACHE})),
        ("llama", "prefix_reuse", OtherSequence(), 0, {Site.ATTN_SCORES, Site.K_CACHE}),
        ("llama", "draft_rounds", StaleRow(1, comes_back), 1, {Site.K_CACHE}),
        ("gemma2", "ring_cache", StaleRow(0, goes_around), 0, {Site.K_CACHE}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Faultless) else None,
)
def test_a_fault_of_a_route_is_found_where_it_is(
    models: Path, kind: str, scenario: str, fault: Faultless, layer: int, sites: set[Site]
) -> None:
    """Its clean twins are the runs above; plain decode does not see it."""
    found = audit(model(models, kind, 512 if scenario == "ring_cache" else 128), f"decode,{scenario}", fault)
    by_name = verdicts(found)
    assert by_name[scenario] == "MISMATCH", by_name
    assert by_name["decode"] in ("STRUCTURAL_DRIFT", "EXACT")
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.site in sites) == (layer, True), found.first_failure


@pytest.mark.parametrize("way", [WAYS[0], *further(*WAYS[1:])])
def test_a_state_that_loses_rows_is_found_in_each_way_of_saving_it(models: Path, way: str) -> None:
    found = audit(model(models, "llama"), "export_import", LostTail(way))
    assert verdicts(found) == {"export_import": "MISMATCH"}
    first = found.first_failure
    assert first is not None
    assert (first.prompt, first.layer, first.site) == (f"a / moved, {way}", 1, Site.V_CACHE)


def test_rows_that_see_each_other_are_found_by_the_scenario_that_has_rows(models: Path) -> None:
    found = verdicts(audit(model(models, "llama"), "decode,rewind,batch", SeesItsNeighbours()))
    assert found["batch"] == "MISMATCH"
    assert {found["decode"], found["rewind"]} <= {"STRUCTURAL_DRIFT", "EXACT"}
