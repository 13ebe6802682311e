"""Dumps drawn from a recorded pool, with and without a fault, and what kvdrift says of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvdrift.errors import UsageError
from kvdrift.logprobs.dump import Dump, SequenceRecord, as_columns
from kvdrift.logprobs.judge import judge
from kvdrift.logprobs.outcome import LogprobPlan
from kvdrift.logprobs.pairing import pair

Arrays = Mapping[str, np.ndarray[Any, Any]]
# Sequences of a dump, out of those of the pool.
N_DRAWN = 16
CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class DumpKind:
    """What a dump is drawn from: keys of the pool, dtypes of both sides, and what is right to say.

    `column_b` is the column of B; `shift` displaces it by tokens. `guilty` is the side that a third dump must name.
    """

    fault: str
    tokens: str
    b: str
    dtypes: tuple[str, str]
    column_b: str = "logprob"
    shift: int = 0
    guilty: str | None = None

    @property
    def third(self) -> str:
        return f"{self.tokens}/prefill"


@dataclass(frozen=True, slots=True)
class LogprobRun:
    """One dump and what was said of it."""

    fault: str
    dtypes: str
    third: bool
    verdict: str
    cause: str | None
    guilty: str | None
    right: bool
    guilty_right: bool | None
    ratio: float


def load_pool(path: Path) -> Arrays:
    """Return the arrays of a pool.

    Raises:
        UsageError: there is none.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the pool {path}: {error}; record it with --record") from error


def dump_kinds(pool: Arrays) -> list[DumpKind]:
    """Return everything that the pool can show: clean pairs of all dtypes, and faults of either side."""
    from kvdrift_bench.run.logprob_pool import SAMPLER_FAULTS, TRAINER_FAULTS

    found: list[DumpKind] = []
    for own in ("float32", "bfloat16", "int8"):
        for trainer in ("float32", "bfloat16"):
            found.append(DumpKind(CLEAN, own, f"{own}/trainer-{trainer}", (own, trainer)))
        trainer = "float32" if own == "float32" else "bfloat16"
        for fault in TRAINER_FAULTS:
            key = f"{own}/trainer-{trainer}-{fault}"
            found.append(DumpKind(f"trainer: {fault}", own, key, (own, trainer), guilty="B"))
        scored = f"{own}/trainer-{trainer}"
        for column, fault in (("cooled", "stale_temperature"), ("displaced", "wrong_row")):
            found.append(DumpKind(f"trainer: {fault}", own, scored, (own, trainer), column_b=column, guilty="B"))
        for shift in (1, -1):
            fault = "trainer: mask_off_by_one"
            found.append(DumpKind(fault, own, scored, (own, trainer), shift=shift, guilty="B"))
    for fault in SAMPLER_FAULTS:
        for own in ("bfloat16", "float32"):
            key = f"{own}-{fault}"
            if f"{key}/sampler/token" in pool:
                # Its own prefill has the stale weights as well: the trainer is then the one that is alone.
                guilty = "B" if fault == "stale_weights" else "A"
                found.append(
                    DumpKind(f"sampler: {fault}", key, f"{key}/trainer-float32", (own, "float32"), guilty=guilty)
                )
    return [item for item in found if f"{item.b}/{item.column_b}" in pool]


def run_dumps(pool: Arrays, *, clean: int, each: int, seed: int) -> Iterator[LogprobRun]:
    """Draw dumps and judge them: `clean` of those without a fault, `each` of every fault and dtype."""
    rng = np.random.default_rng(seed)
    every = dump_kinds(pool)
    without = [item for item in every if item.fault == CLEAN]
    chosen = [without[i % len(without)] for i in range(clean)]
    chosen += [item for item in every if item.fault != CLEAN for _ in range(each)]
    for number, subject in enumerate(chosen):
        yield run_dump(pool, subject, with_third=bool(number % 2), rng=rng)


def run_dump(pool: Arrays, subject: DumpKind, *, with_third: bool, rng: np.random.Generator) -> LogprobRun:
    """Draw one dump of `subject` and judge it."""
    n = len(pool[f"{subject.tokens}/sampler/token"])
    rows = np.sort(rng.choice(n, size=min(N_DRAWN, n), replace=False))
    a = _dump(pool, f"{subject.tokens}/sampler", rows)
    b = _dump(pool, subject.b, rows, column=subject.column_b, shift=subject.shift)
    third = _dump(pool, subject.third, rows) if with_third else None
    found = judge(pair(a, b, third=third), LogprobPlan(dtype_a=subject.dtypes[0], dtype_b=subject.dtypes[1]))
    wanted = "STRUCTURAL_DRIFT" if subject.fault == CLEAN else "MISMATCH"
    guilty = None if found.guilt is None else found.guilt.side
    return LogprobRun(
        fault=subject.fault,
        dtypes=" / ".join(subject.dtypes),
        third=with_third,
        verdict=str(found.verdict),
        cause=None if found.cause is None else found.cause.name,
        guilty=guilty,
        right=str(found.verdict) == wanted,
        guilty_right=guilty == subject.guilty if with_third and subject.guilty else None,
        ratio=found.ratio,
    )


def _dump(pool: Arrays, key: str, rows: np.ndarray[Any, Any], *, column: str = "logprob", shift: int = 0) -> Dump:
    tokens, values = pool[f"{key}/token"], pool[f"{key}/{column}"]
    records = []
    for i in rows:
        logprobs: list[float | None] = [float(value) for value in values[i]]
        if shift:
            moved: list[float | None] = [None] * abs(shift)
            logprobs = moved + logprobs[:-shift] if shift > 0 else logprobs[-shift:] + moved
        records.append(SequenceRecord(name=f"s{i}", tokens=[int(token) for token in tokens[i]], logprobs=logprobs))
    return as_columns(key, records)
