"""Faults that are planted into decode steps of llama.cpp are found, at the layer and the site where they begin."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.facts import Tally
from kvdrift_bench.planted.llamacpp import Grounds, LlamaFault, corpus_for
from tests.support.gguf import N_LAYERS, audit_gguf
from tests.support.matrix import further

# Of four layers faults of one layer are in layer 2, which is recorded.
CORPUS = {fault.name: fault for fault in corpus_for(N_LAYERS)}
GROUNDS = Grounds(N_LAYERS, "f16", full={0, 1, 2, 3})


def is_at(audit: Audit, fault: LlamaFault) -> bool:
    first = audit.first_failure
    return first is not None and (first.layer, first.site) in fault.places(GROUNDS)


@pytest.mark.parametrize(
    "name",
    [
        "slot_aliased",
        "position_plus_one",
        *further("keys_rolled", "k_scale_1.05_on_new_rows", "last_slots_of_another_page", "last_key_lost"),
    ],
)
def test_a_fault_in_every_configuration_is_semantic(folder: Path, name: str) -> None:
    fault, tally = CORPUS[name], Tally()
    audit = audit_gguf(folder, fault=fault.plant(tally))
    assert tally.changed > 0
    assert audit.verdict is Verdict.MISMATCH
    assert audit.kind == "semantic"
    assert is_at(audit, fault), audit.first_failure
    assert audit.diagnosis is not None
    assert fault.is_cause(audit.diagnosis.cause), audit.diagnosis


def test_a_wrong_scale_of_quantised_keys_is_found_with_flash_attention(folder: Path) -> None:
    fault = CORPUS["k_scale_lost_on_all_rows"]
    audit = audit_gguf(folder, fault=fault.plant(Tally()), kv_type="q8_0", flash=True)
    assert audit.verdict is Verdict.MISMATCH
    assert is_at(audit, fault), audit.first_failure


@pytest.mark.parametrize(
    "name", ["slot_zero", "heads_tiled", *further("v_scale_0.9", "q_position_plus_one", "last_key_lost")]
)
def test_without_the_ladder_a_gross_fault_is_found_where_it_enters(folder: Path, name: str) -> None:
    """Few sites of llama.cpp have the same bits going in; those that differ by rounding are judged as well."""
    fault = CORPUS[name]
    audit = audit_gguf(folder, fault=fault.plant(Tally()), ladder="off")
    assert audit.verdict is Verdict.MISMATCH
    assert is_at(audit, fault), audit.first_failure
    assert audit.diagnosis is not None
    assert fault.is_cause(audit.diagnosis.cause), audit.diagnosis


@dataclass
class LoudFlash(Faultless):
    """A fault of the fused kernel alone: what it returns for one token is scaled."""

    layer: int
    factor: float = 1.5

    def after(self, node: Tensor, role: Role | None, call: Fed) -> None:
        if role is not None and role.kind == "flash" and role.layer == self.layer and len(call.members) == 1:
            node.write(node.values().astype(np.float32) * np.float32(self.factor))


@pytest.mark.parametrize(
    ("fault", "layer", "site"),
    [
        (CORPUS["slot_aliased_where_packed"].plant(Tally()), 2, Site.K_CACHE),
        (LoudFlash(2), 2, Site.ATTN_CTX),
    ],
)
def test_a_fault_of_the_shipped_configuration_alone_is_found_by_the_native_instruments(
    folder: Path, fault: Faultless, layer: int, site: Site
) -> None:
    audit = audit_gguf(folder, fault=fault, kv_type="q8_0", flash=True)
    assert audit.verdict is Verdict.MISMATCH
    assert audit.kind == "precision"
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (layer, site)
    evidence = {(item.instrument, item.mode): item for item in audit.evidence}
    assert evidence["ladder", "kv_aligned"].supports == "H0"
    assert evidence["native", "kv_aligned"].supports == "H1"
    # Replay tells wrong bytes from wrong arithmetic: each pass is replayed on the bytes that it was given.
    assert evidence["replay", "kv_aligned"].supports == ("H1" if isinstance(fault, LoudFlash) else "H0")
