"""The values that the judgement of a server ends in."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvdrift.server.estimates import ChangePoint, Divergence
from kvdrift.server.values import LogprobPair
from kvdrift.vocabulary.evidence import Verdict

# The first generated token comes out of the prefill in both passes, only at another length.
FIRST_TOKEN = "first_token"

# The drift of a decode route may be so many times the drift of decode alone, and drift behind a boundary so many times
# the drift in front of it; neither is taken for less than a quarter of the rounding. It is the same two kernels.
CONTRAST = 8.0
# The smallest p-value of a change point is 0.001.
STEP_P = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteResult:
    """One route against the reference.

    `typical` is the rms drift over all prompts and `largest` the largest single one, in nats; `bound` is what noise
    allows.
    `ratio` is the geometric mean over prompts of rms drift over bound, with the p-value of its being 1. `worst` is the
    pair with the largest drift.
    """

    route: str
    n: int
    n_prompts: int
    typical: float
    largest: float
    noise: float
    bound: float
    ratio: float
    p_value: float | None
    beyond: bool
    within: bool
    why: str
    worst: LogprobPair | None
    divergence: Divergence | None
    change: ChangePoint | None
    n_nonfinite: int


@dataclass(frozen=True, slots=True)
class Reason:
    """Why there is no verdict, and what would settle it."""

    text: str
    remedy: str


@dataclass(slots=True)
class ServerDecision:
    """The judgement of one server.

    `minimum_detectable` is the typical (rms) error of decode alone that would have been seen, in nats,
    at positions below `seen_below` (None: at all that were compared).
    """

    verdict: Verdict
    routes: list[RouteResult]
    control: RouteResult | None
    rounding: float
    rounding_from: str
    reasons: list[Reason] = field(default_factory=list)
    diagnosis: str | None = None
    shift: int = 0
    self_noise: dict[str, float] = field(default_factory=dict)
    smallest_p: float | None = None
    minimum_detectable: float | None = None
    seen_below: int | None = None

    @property
    def first_failure(self) -> LogprobPair | None:
        """The earliest pair beyond noise on the first route that is beyond it."""
        result = next((r for r in self.routes if r.beyond), None)
        return None if result is None else result.worst
