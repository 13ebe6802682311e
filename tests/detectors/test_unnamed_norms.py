"""Norms of queries and keys under any name are found, and so is the cause where decode leaves their modules out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.foreign import DIM, FAULTY, Attention, Norm, engine_of, rotated, wide
from tests.support.matrix import further

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}


class Normed(Attention):
    """A norm of each head in front of its rotation, with a name of its own, and another base."""

    def build(self) -> None:
        super().build()
        self.scale_of_queries, self.scale_of_keys = Norm(DIM), Norm(DIM)

    def turn(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if len(positions) == 1 and self.index == FAULTY:
            return self.turned_in_decode(q, k, positions)
        return self.turned(q, k, positions)

    def turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(self.scale_of_queries(q), positions, 3e5), rotated(self.scale_of_keys(k), positions, 3e5)

    def turned_in_decode(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.turned(q, k, positions)


def over(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return wide(x) * torch.rsqrt(wide(x).pow(2).mean(axes, keepdim=True) + 1e-5)


class OverAllHeads(Normed):
    def turned_in_decode(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        normed = over(q, (1, 3)) * wide(self.scale_of_queries.weight)
        return rotated(normed.to(q.dtype), positions, 3e5), rotated(self.scale_of_keys(k), positions, 3e5)


class WeightLost(Normed):
    def turned_in_decode(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(over(q, (3,)).to(q.dtype), positions, 3e5), rotated(self.scale_of_keys(k), positions, 3e5)


class OneKeyHeadBehind(Normed):
    def turned_in_decode(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        right = self.turned(q, k, positions)
        late = self.turned(q, k, positions - 1)[1]
        return right[0], torch.cat([right[1][:, :1], late[:, 1:]], dim=1)


class AnotherBase(Normed):
    def turned_in_decode(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(self.scale_of_queries(q), positions, 1e4), rotated(self.scale_of_keys(k), positions, 1e4)


def audited(way: type[Attention]) -> Audit:
    return kvdrift.audit(engine_of(way), prompts=PROMPTS, span=3)


def test_such_norms_are_recorded_and_pass() -> None:
    audit = audited(Normed)
    compared = {place.site for place in audit.suite.judged.measured.table.select("kv_aligned", "bfloat16").places}

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)
    assert {Site.Q_NORM, Site.K_NORM} <= compared


@pytest.mark.parametrize(
    ("way", "site", "cause"),
    [
        (OverAllHeads, Site.Q_ROPE, "norm_over_parts"),
        *further(
            (WeightLost, Site.Q_ROPE, "norm_weight_wrong"),
            (AnotherBase, Site.Q_ROPE, "rope_base"),
        ),
        (OneKeyHeadBehind, Site.K_CACHE, "rope_position_offset_k"),
    ],
)
def test_what_decode_does_behind_them_is_named(way: type[Attention], site: Site, cause: str) -> None:
    audit = audited(way)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (FAULTY, site)
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause, audit.diagnosis
