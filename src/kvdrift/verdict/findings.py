"""What was measured, as far as a verdict needs it: the value between comparing and deciding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvdrift.compare.drift import DriftTable
from kvdrift.instruments.asymmetry import ErrorTable
from kvdrift.instruments.cacheaudit import SlotTable
from kvdrift.instruments.recorded import Terms
from kvdrift.instruments.replay import ReplayTable
from kvdrift.instruments.route import Route
from kvdrift.instruments.router import RouterTable
from kvdrift.instruments.rowwise import RowTable
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.evidence import Caveat
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import RUNGS, Roundoffs, Rungs


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What is known of traces that kvdrift did not capture itself.

    `arithmetic` is the dtype that the engine computes in, None if unknown; `remarks` become caveats; `gaps` say what
    the files lack so that no pass can be given.
    """

    arithmetic: str | None
    n_layers: int
    remarks: tuple[Caveat, ...] = ()
    gaps: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)  # mode -> why the files hold nothing of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was measured, as far as a verdict needs it."""

    table: DriftTable
    routes: Sequence[Route]
    modes: Sequence[Mode]
    native: str
    prompts: Sequence[str]
    probed_tokens: Mapping[str, Sequence[int]]
    failures: dict[str, str]  # mode -> why it did not run or broke off
    rung_failures: dict[str, str]  # rung -> why it could not run
    replay: ReplayTable
    alpha: float
    seed: int
    rungs: Rungs = RUNGS  # the coarse and the fine rung of the ladder
    roundoffs: Roundoffs | None = None  # how coarsely a native precision without a dtype of its own rounds
    errors: ErrorTable | None = None  # None where no specification can be run
    ladder: str = "model"  # "off" leaves the verdict to the native instruments
    control_place: Place | None = None
    control_size: float | None = None
    control_mode: Mode | None = None
    recorded: Recorded | None = None
    routers: RouterTable | None = None  # None where no choice of experts was looked at
    slots: SlotTable | None = None  # None for mixtures of experts
    row_wise: RowTable | None = None

    def terms(self, mode: str) -> Terms:
        """How recorded values of `mode` are judged."""
        assert self.recorded is not None
        return Terms(mode, self.native, self.recorded.arithmetic, self.recorded.n_layers)
