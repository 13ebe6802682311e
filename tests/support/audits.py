"""Audits that several tests ask about: each is made once in a process.

Tests that share audits belong to one `xdist_group`, so that one process runs them all. What they are handed is the same
value: they read it and change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.plan import LadderChoice
from kvdrift_bench.planted.torch import corpus_for
from tests.support.carriers import N_LAYERS, PROMPTS, SPAN, carrier_of
from tests.support.tiny import tiny_model

# 11 tokens cross the sliding windows of 8, and two steps behind them have the second read what the first one wrote; one
# token makes decode start right away.
CLEAN_PROMPTS = {"long": PROMPTS["p"], "one": [7]}
CLEAN_SPAN = 2
# Architectures, one of each kind: two windows, experts, sinks, products of low rank, a recurrent state, a hybrid.
CORE = ("llama", "gemma2", "mixtral", "gpt2", "gpt_oss", "deepseek_v3", "mamba2", "qwen3_next")
FAULTS = {fault.name: fault for fault in corpus_for(N_LAYERS)}


@dataclass(frozen=True)
class PlantedAudit:
    """The audit of a tiny model with a fault in it, and how often the fault was committed and changed a value."""

    audit: Audit
    model: Any
    count: int
    changed: int

    def is_at(self, name: str) -> bool:
        """Whether the audit is a MISMATCH at a true place of the fault `name`."""
        is_mismatch = self.audit.verdict is kvdrift.Verdict.MISMATCH and self.audit.exit_code == 1
        return is_mismatch and FAULTS[name].is_at(self.audit.first_failure, self.model)


@cache
def audited(
    name: str, architecture: str | None = None, dtype: str = "float32", scenarios: tuple[str, ...] | None = None
) -> PlantedAudit:
    """Audit a tiny model with the fault `name` planted in it.

    The model is that of an architecture as it is initialised, or, without one, the lively one of the first architecture
    that can carry the fault.
    """
    fault = FAULTS[name]
    if architecture is None:
        model = carrier_of(fault, dtype)[1]
    else:
        # Only a model that was loaded keeps frequencies that bfloat16 cannot hold.
        model = tiny_model(architecture, dtype=getattr(torch, dtype), lively="frequencies" in name)
    with fault.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=SPAN, scenarios=scenarios)
    return PlantedAudit(audit, model, commits.count, commits.changed)


def by_architecture(architectures: Iterable[str], core: Collection[str] | None = None) -> list[ParameterSet]:
    """Return a parameter for each architecture, so that one process makes all clean audits of an architecture.

    Those that are not in `core` are marked as part of the matrix.
    """
    rest = [] if core is None else [pytest.mark.matrix]
    return [
        pytest.param(name, marks=[pytest.mark.xdist_group(name), *(() if core and name in core else rest)])
        for name in architectures
    ]


@cache
def clean_audit(
    architecture: str, dtype: str = "float32", attention: str | None = None, ladder: LadderChoice = "model"
) -> Audit:
    """Audit a tiny model as it is."""
    model = tiny_model(architecture, dtype=getattr(torch, dtype), attention=attention)
    return kvdrift.audit(model, prompts=CLEAN_PROMPTS, span=CLEAN_SPAN, ladder=ladder)
