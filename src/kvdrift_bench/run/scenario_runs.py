"""Runs `--scenario all` on tiny models, each with one fault of a scenario planted in it, and on each without any."""

from __future__ import annotations

import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from torch import nn

import kvdrift
from kvdrift.errors import UsageError
from kvdrift.scenarios.catalogue import ALL
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift_bench.models.architectures import ARCHITECTURES
from kvdrift_bench.models.carriers import N_LAYERS, PROMPTS, SPAN, carrier_of, lively, one_thread
from kvdrift_bench.planted.torch import Commits, Fault, corpus_for
from kvdrift_bench.run.records import RecordFile

_DTYPE = "float32"


class Cell(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What one scenario said of one run.

    Attributes:
        verdict: None where the scenario does not apply; `reason` says why.
        right: whether `address`, the first failure, is where the fault was planted; None without a fault or failure.
    """

    verdict: str | None
    address: str | None = None
    right: bool | None = None
    reason: str = ""

    @property
    def is_mismatch(self) -> bool:
        return self.verdict == "MISMATCH"


class MatrixRow(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One run of all scenarios.

    Attributes:
        kind: "fault", or "clean" for a model with nothing planted in it.
        needs: the scenario that the fault was made for.
        committed, changed: how often the fault was committed, and how often that changed a tensor.
        error: why the run broke off, None if it did not.
        made, spared: forward passes that the scenarios made, and prefills that they shared instead of making them.
    """

    kind: Literal["fault", "clean"]
    name: str
    model: str
    needs: str | None = None
    mechanism: str | None = None
    reference: str | None = None
    where: str | None = None
    committed: int = 0
    changed: int = 0
    cells: dict[str, Cell] = {}
    made: int = 0
    spared: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        return self.kind, self.name, self.model


@dataclass(frozen=True, slots=True)
class Trial:
    """A model to be audited, with a fault in it or without."""

    row: MatrixRow
    model: Any
    fault: Fault | None = None

    def plant(self) -> AbstractContextManager[Commits]:
        """Plant the fault while the context is open."""
        return nullcontext(Commits()) if self.fault is None else self.fault.plant(self.model)


def choose_runs(faults: Sequence[str] | None, models: Sequence[str] | None) -> list[Trial]:
    """Return a clean run of each architecture and of each carrier, then the runs with a fault.

    Args:
        faults: names of faults that need a scenario; None for all of them.
        models: architectures of which a clean run is wanted beside those of the carriers; None for all of them.

    Raises:
        UsageError: there is no such fault or architecture.
    """
    corpus = {fault.name: fault for fault in corpus_for(N_LAYERS) if fault.needs is not None}
    _require_known(faults or (), corpus)
    _require_known(models or (), ARCHITECTURES)
    clean: dict[str, Any] = dict.fromkeys(ARCHITECTURES if models is None else models)
    planted = []
    for fault in [corpus[name] for name in (corpus if faults is None else faults)]:
        label, model = carrier_of(fault, _DTYPE)
        clean.setdefault(label, model)
        row = MatrixRow(
            kind="fault",
            name=fault.name,
            model=label,
            needs=fault.needs,
            mechanism=fault.mechanism,
            reference=fault.reference,
            where=fault.where,
        )
        planted.append(Trial(row, model, fault))
    found = [
        Trial(MatrixRow(kind="clean", name="clean", model=label), model or lively(label, _DTYPE))
        for label, model in clean.items()
    ]
    return [*found, *planted]


def _require_known(names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {name!r}; known: {', '.join(sorted(known))}")


def run_matrix(
    runs: Sequence[Trial], file: RecordFile[MatrixRow], progress: Progress | None = None
) -> Iterator[MatrixRow]:
    """Audit what `file` does not hold yet, add each row to it and yield it."""
    waiting = file.missing(runs, lambda run: run.row.key)
    return file.measure(waiting, _measure, lambda run: f"{run.row.model}: {run.row.name}", progress or Silent())


def _measure(run: Trial) -> MatrixRow:
    row, commits = run.row, Commits()
    began = time.perf_counter()
    try:
        with one_thread(), run.plant() as commits:
            audit = kvdrift.audit(run.model, prompts=PROMPTS, span=SPAN, scenarios=ALL)
    except Exception as error:  # noqa: BLE001 - whatever a fault breaks, the row says that it was not judged
        row.error = traceback.format_exception_only(error)[-1].strip()
    else:
        row.cells = {item["name"]: _cell(item, run.fault, run.model) for item in audit.view["scenarios"]}
        row.made, row.spared = audit.view["forward_passes"]["made"], audit.view["forward_passes"]["saved"]
    row.committed, row.changed = commits.count, commits.changed
    row.seconds = round(time.perf_counter() - began, 2)
    return row


def _cell(item: dict[str, Any], fault: Fault | None, model: nn.Module) -> Cell:
    address = item["first_failure"]
    return Cell(
        verdict=item["verdict"],
        address=address,
        right=None if fault is None or address is None else fault.is_at(Address.parse(address), model),
        reason=next(iter(item["reasons"]), ""),
    )
