"""Faults that are planted into decode steps of llama.cpp are found, at the layer and the site where they begin."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.faults import (
    AliasedSlot,
    Faultless,
    RolledRows,
    ScaledRow,
    ShiftedCache,
    ShiftedPosition,
    UnwrittenRow,
)
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role
from kvdrift.engines.llamacpp.recorder import Fed
from kvdrift.sites import Site
from kvdrift.verdict.model import Verdict
from tests.support.gguf import audit_gguf

FAULTS = [
    (RolledRows(1), "slot_aliased"),
    (AliasedSlot(2), "slot_aliased"),
    (ScaledRow(1), "k_scale_lost"),
    (UnwrittenRow(2), "slot_zero"),
    (ShiftedPosition(), "rope_position_offset"),
    (ShiftedCache(), None),
]


@pytest.mark.parametrize(("fault", "cause"), FAULTS)
def test_a_fault_in_every_configuration_is_semantic(folder: Path, fault: Faultless, cause: str | None) -> None:
    audit = audit_gguf(folder, fault=fault)
    assert audit.verdict is Verdict.MISMATCH
    assert audit.kind == "semantic"
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == fault.address
    if cause is not None:
        assert audit.diagnosis is not None
        assert audit.diagnosis.cause == cause


def test_a_wrong_scale_of_quantised_keys_is_found_with_flash_attention(folder: Path) -> None:
    fault = ScaledRow(2)
    audit = audit_gguf(folder, fault=fault, kv_type="q8_0", flash=True)
    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == fault.address


@dataclass
class AliasedWherePacked(AliasedSlot):
    """A fault of the quantised cache alone: the clean configurations do not have it."""

    def spoil(self, node: Tensor, rows: NDArray[np.uint8], newest: int) -> NDArray[np.uint8]:
        return super().spoil(node, rows, newest) if node.ggml.type_name(node.kind) == "q8_0" else rows


@dataclass
class LoudFlash(Faultless):
    """A fault of the fused kernel alone: what it returns for one token is scaled."""

    layer: int
    factor: float = 1.5

    @property
    def address(self) -> tuple[int, Site] | None:
        return (self.layer, Site.ATTN_CTX)

    def after(self, node: Tensor, role: Role, call: Fed) -> None:
        if role.kind == "flash" and role.layer == self.layer and len(call.members) == 1:
            node.write(node.values().astype(np.float32) * np.float32(self.factor))


@pytest.mark.parametrize("fault", [AliasedWherePacked(1), LoudFlash(2)])
def test_a_fault_of_the_shipped_configuration_alone_is_found_by_the_native_instruments(
    folder: Path, fault: Faultless
) -> None:
    audit = audit_gguf(folder, fault=fault, kv_type="q8_0", flash=True)
    assert audit.verdict is Verdict.MISMATCH
    assert audit.kind == "precision"
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == fault.address
    evidence = {(item.instrument, item.mode): item for item in audit.evidence}
    assert evidence["ladder", "kv_aligned"].supports == "H0"
    assert evidence["native", "kv_aligned"].supports == "H1"
    # Replay tells wrong bytes from wrong arithmetic: each pass is replayed on the bytes that it was given.
    assert evidence["replay", "kv_aligned"].supports == ("H1" if isinstance(fault, LoudFlash) else "H0")
