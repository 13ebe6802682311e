"""The results of an audit: verdict, evidence, caveats, diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.shapes import ErrorShape

CHOICE = "choice"  # the instrument that looks at the choices of a generation loop
CONTROL_SEEN = "positive_control"  # the instrument that looks for the faults which an audit plants itself

Kind = Literal["semantic", "precision"]
Side = Literal["H0", "H1"]


class Verdict(StrEnum):
    """The conclusion of an audit, or of one mode."""

    EXACT = "EXACT"  # the same bits on two proven routes
    STRUCTURAL_DRIFT = "STRUCTURAL_DRIFT"  # H0: rounding explains it
    MISMATCH = "MISMATCH"  # H1: rounding cannot explain it
    INCONCLUSIVE = "INCONCLUSIVE"  # could not tell; never a pass

    @property
    def exit_code(self) -> int:
        """0 for EXACT and STRUCTURAL_DRIFT, 1 for MISMATCH, 6 for INCONCLUSIVE."""
        return {Verdict.MISMATCH: 1, Verdict.INCONCLUSIVE: 6}.get(self, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one instrument saw in one mode.

    Attributes:
        instrument: `bits`, `ladder`, `positive_control`, ...
        mode: the mode that it examined, None for the whole audit.
        statistic: the figure on which it decides, named in `statistic_name`.
        bound: the largest value of the statistic that H0 allows, None if there is none.
        p_value: None for an instrument that decides by a bound instead of a distribution.
        supports: the hypothesis that it supports, None if it abstains.
        valid: False if the instrument could not run or had no power; `reason` then says why.
        minimum_detectable: the smallest relative error that it would have seen, None if not defined.
        text: one sentence for the reader.
        detail: figures for report.json.
    """

    instrument: str
    mode: str | None
    statistic_name: str
    statistic: float | None
    bound: float | None = None
    p_value: float | None = None
    supports: Side | None = None
    valid: bool = True
    reason: str | None = None
    minimum_detectable: float | None = None
    text: str = ""
    detail: dict[str, object] = field(default_factory=dict)

    @classmethod
    def abstain(
        cls, instrument: str, mode: str | None, statistic_name: str, reason: str, *, bound: float | None = 1.0
    ) -> Evidence:
        """Return the evidence of an instrument that could not judge, and why."""
        return cls(
            instrument=instrument,
            mode=mode,
            statistic_name=statistic_name,
            statistic=None,
            bound=bound,
            valid=False,
            reason=reason,
            text=reason,
        )


@dataclass(frozen=True, slots=True)
class Caveat:
    """A limit of this verdict that the reader must see; `code` is stable, `text` is for people."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The explanation that reproduces a mismatch, and the share of it that it explains (0 to 1).

    `slots` are the cached positions that the cause is about, where it is about some and not all. `shape` is that of an
    error which no cause explains; None for one that a cause explains, and where the values of the first failure were
    not kept.
    """

    cause: Cause
    explained: float
    text: str
    slots: tuple[int, ...] = ()
    shape: ErrorShape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeOutcome:
    """The conclusion of one mode.

    `status` is PASS, FAIL, INCONCLUSIVE, ERROR or NOT RUN; `verdict` is None exactly when the mode did not run to its
    end. `n_within` and `n_beyond` count pairs against the noise, `n_exact` those with equal bits at the native dtype.
    """

    mode: str
    status: Literal["PASS", "FAIL", "INCONCLUSIVE", "ERROR", "NOT RUN"]
    verdict: Verdict | None
    kind: Kind | None
    first_failure: Address | None
    n_pairs: int
    n_exact: int
    n_within: int
    n_beyond: int
    n_unpaired: int
    reasons: tuple[str, ...] = ()
