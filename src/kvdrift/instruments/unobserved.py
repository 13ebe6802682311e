"""Whether what was judged is what the engine runs: the same passes while nothing watches them, and one pass twice.

A hook, a function mode or another argument may make a model run other code than it runs by itself. So prefill and
decode of one prompt also run while nothing watches, with the engine's default arguments, and their logits are held
against the recorded ones. Both runs have the same tokens, shapes and kernels, so that their bits are equal, with two
exceptions: prefill asks its last product for one row instead of several, which may round otherwise, and an engine that
does not give the same bits each time differs by as much as it differs from itself. Every pass runs twice for that.

Where they differ beyond that, the size decides. The same two passes run at the fine rung of the ladder, watched and
unwatched: code that only rounds otherwise differs there by no more than some float32 roundings (casts to float32 inside
the model are not lifted in either), and code that computes something else by as much as before. Without a fine rung the
bound is one of the native dtype: several times what the recorded passes differ by from each other, or from the fine
rung.

Two runs of one pass that differ by more than rounding are a random model, or one that keeps state between its calls:
no difference between prefill and decode means anything then. Where prefill gives the same bits each time, and decode
alone does not, that is something decode does and prefill does not, such as a race: what else is found is a mismatch.

Blind to a fault that shows in no logit of this prompt, and, where only the native dtype can tell, to one that is below
that bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen
from kvdrift.pairing.align import Aligner
from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import REPEATED, Mode, PairRole
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF, Arithmetic
from kvdrift.vocabulary.schedule import unobserved_prompt
from kvdrift.vocabulary.sites import Site

_LOGITS = frozenset({Site.LOGITS})
# Roundings of a unit that the logits of one layer may be off by; errors of several layers add up like a random walk.
# Half precision accumulates in float32, so that a layer rounds a few times; float32 rounds with every term of a sum.
_ROUNDINGS_HALF, _ROUNDINGS = 4.0, 64.0
# One product with other rows beside it: a rounding of the result in each element, or that of its sum.
_PRODUCT_HALF, _PRODUCT = 2.0, 64.0
# How much more other code may round than the recorded passes do.
_MARGIN = 8.0


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two runs of one pass are apart: `size` is the largest relative difference of logits, in the 2-norm.

    `size` is infinite where one of them is NaN or infinite in another place than the other; `address` is where it is
    largest.
    """

    size: float
    is_equal: bool
    address: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFindings:
    """What the unobserved runs say.

    Attributes:
        random: what to say where two runs of one pass differ by more than rounding, so that nothing can be judged; None
            if they do not.
        in_decode_alone: whether that is so of decode alone, and prefill gives the same bits each time.
        noise: by how much two runs of one pass differ, if they do, and by no more than rounding.
        differs: what to say where the recorded pass is not that of the engine; None where it is.
        mismatch: the address of a difference that rounding cannot explain.
        is_semantic: whether it stays at the fine rung.
    """

    random: str | None = None
    in_decode_alone: bool = False
    noise: float = 0.0
    differs: str | None = None
    mismatch: Address | None = None
    is_semantic: bool = False


def runs_in(panel: Panel) -> RunFindings:
    """Return what the unobserved runs say; nothing where none ran."""
    found = panel.seen(Unobserved.name).found
    return found if isinstance(found, RunFindings) else RunFindings()


_Key = tuple[str, PairRole, str]  # rung, role and pass


@dataclass(slots=True)
class Unobserved:
    """Holds the recorded passes against the same passes while nothing watches."""

    name: ClassVar[str] = "unobserved"
    judges: ClassVar[Judges] = "run"
    found: dict[_Key, Difference] = field(default_factory=dict)
    prompt: str | None = None
    _native: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # logits of a pass [position, token]
    _error: float = 0.0  # of the recorded native passes, against the fine rung

    def see(self, item: RecordedPair, run: Run) -> None:
        """Measure two runs of one pass; of the recorded passes of the same prompt, the error of the native ones."""
        if item.role in REPEATED:
            self.prompt = item.pair.decode.prompt
            key = (item.pair.decode.rung, item.role, item.pair.decode.pass_name)
            self.found[key] = _difference(item.pair)
        elif (item.role, item.pair.mode) == (PairRole.PAIR, Mode.AS_DESIGNED) and run.foreign is None:
            self._see_recorded(item.pair, run)

    def _see_recorded(self, pair: PassPair, run: Run) -> None:
        rung = pair.prefill.rung
        if pair.decode.prompt != unobserved_prompt(run.prompts).name or rung not in (
            run.info.dtype,
            run.info.ladder.upper,
        ):
            return
        for trace in (pair.prefill, pair.decode):
            logits = _logits(trace, pair.positions)
            known = self._native.get(trace.pass_name)
            if rung == run.info.dtype:
                self._native[trace.pass_name] = logits
            elif known is not None and known.shape == logits.shape:
                self._error = max(self._error, float(_distance(logits, known).max(initial=0.0)))

    def take_over(self, other: Unobserved) -> None:
        """Judge by what another one saw: a route that has no unobserved runs of its own."""
        self.found, self.prompt = dict(other.found), other.prompt

    @property
    def rungs(self) -> tuple[str, ...]:
        """The rungs at which passes ran unobserved."""
        return tuple(dict.fromkeys(rung for rung, _, _ in self.found))

    def in_doubt(self, run: Run) -> bool:
        """Whether a recorded pass at the native dtype is not that of the engine, so that the fine rung must tell."""
        return bool(self._doubtful(run))

    def _doubtful(self, run: Run) -> list[tuple[str, Difference]]:
        """The passes at the native dtype whose recorded bits are not those of the unobserved run."""
        native, arithmetic = run.info.dtype, run.info.arithmetic
        doubtful = []
        for name in ("prefill", "decode"):
            seen = self.found.get((native, PairRole.UNOBSERVED, name))
            if seen is None or seen.is_equal:
                continue
            again = self.found.get((native, PairRole.REPEAT, name))
            noise = 0.0 if again is None else again.size
            product = _product(arithmetic) if name == "prefill" else 0.0
            if not seen.size <= max(_MARGIN * noise, product):
                doubtful.append((name, seen))
        return doubtful

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge the repeats, then the unobserved runs; nothing where none ran."""
        if not self.found:
            return NOTHING
        repeats = {key: value for key, value in self.found.items() if key[1] is PairRole.REPEAT}
        noise = max((value.size for value in repeats.values()), default=0.0)
        at = next((key for key, value in repeats.items() if _is_random(key, value, run)), None)
        if at is not None:
            alone = self._in_decode_alone()
            random = _random(at, repeats[at], run, alone)
            finding = RunFindings(random=random, in_decode_alone=alone)
            return Seen(evidence=(_repeat_evidence(noise, random),), found=finding)
        finding, evidence = self._judge_unobserved(run, noise)
        return Seen(evidence=(_repeat_evidence(noise, None), evidence), found=finding)

    def _in_decode_alone(self) -> bool:
        """Whether prefill gives the same bits each time, at every rung."""
        prefills = [
            value for (_, role, name), value in self.found.items() if (role, name) == (PairRole.REPEAT, "prefill")
        ]
        return bool(prefills) and all(value.is_equal for value in prefills)

    def _judge_unobserved(self, run: Run, noise: float) -> tuple[RunFindings, Evidence]:
        native, upper = run.info.dtype, run.info.ladder.upper
        doubtful = self._doubtful(run)
        largest = max((d for (rung, role, _), d in self.found.items() if (rung, role) == (native, PairRole.UNOBSERVED)),
                      key=lambda d: d.size)  # fmt: skip
        bound = self._bound(run)
        if not doubtful:
            text = (
                f"prefill and decode of {self.prompt} also ran while nothing watched, with the engine's default "
                "arguments: their logits are those of the recorded passes"
            )
            return RunFindings(noise=noise), _evidence(largest.size, bound, "H0", text)
        name, worst = max(doubtful, key=lambda item: item[1].size)
        fine = [d for (rung, role, _), d in self.found.items() if (rung, role) == (upper, PairRole.UNOBSERVED)]
        judged_at, found, limit = native, worst, bound
        if fine and upper != native:
            judged_at, found, limit = upper, max(fine, key=lambda d: d.size), _floor(upper, run.info.n_layers, None)
        is_beyond = not found.size <= limit
        text = (
            f"{name} of {self.prompt} gives other logits while nothing watches: off by {worst.size:.2g} at {native}, "
            + (f"by {found.size:.2g} at {judged_at}, " if judged_at != native else "")
            + f"where rounding explains at most {limit:.2g}"
            + ("" if is_beyond else f", so it {'may be' if judged_at == native else 'is'} rounding of other code")
        )
        finding = RunFindings(
            noise=noise,
            differs=text,
            mismatch=found.address if is_beyond else None,
            is_semantic=is_beyond and judged_at != native,
        )
        return finding, _evidence(found.size, limit, "H1" if is_beyond else "H0", text)

    def _bound(self, run: Run) -> float:
        """The difference at the native dtype that other code may make by rounding."""
        rows = run.table.select(Mode.AS_DESIGNED, run.info.dtype)
        drift = rows.rel_l2[rows.is_at(Site.LOGITS)]
        drift = drift[np.isfinite(drift)]
        floor = _floor(run.info.dtype, run.info.n_layers, run.info.arithmetic)
        return max(floor, _MARGIN * float(drift.max(initial=0.0)), _MARGIN * self._error)


def _logits(trace: Trace, positions: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the logits [position, token] of a pass; [0, 0] if it recorded none."""
    rows = {
        position: record.values[index].astype(np.float64)
        for record in trace.rows
        if record.site is Site.LOGITS
        for index, position in enumerate(record.positions)
    }
    found = [rows[position] for position in positions if position in rows]
    return np.array(found) if found else np.empty((0, 0))


def _distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return |second - first| / |first| of each row; values that are equal, NaN included, are no distance apart.

    It is infinite where other values than in `first` are NaN or infinite.
    """
    is_same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(is_same, 0.0, second - first)
    size = np.sqrt(np.square(gap).sum(axis=-1))
    norm = np.sqrt(np.square(np.where(np.isfinite(first), first, 0.0)).sum(axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(size == 0.0, 0.0, size / norm)
    return np.where(np.isnan(ratio), np.inf, ratio)


def _difference(pair: PassPair) -> Difference:
    """Measure two runs of one pass; passes without common logits are infinitely far apart."""
    size, is_equal, at = -1.0, True, pair.positions[-1]
    for values in Aligner(pair, sites=_LOGITS).pairs():
        first, second = values.prefill, values.decode
        is_equal = is_equal and first.tobytes() == second.tobytes()
        distance = _distance(first.astype(np.float64), second.astype(np.float64))
        worst = int(distance.argmax())
        if distance[worst] > size:
            size, at = float(distance[worst]), values.positions[worst]
    address = Address(pair.decode.prompt, at, None, Site.LOGITS)
    return Difference(math.inf, False, address) if size < 0.0 else Difference(size, is_equal, address)


def _unit(rung: str, arithmetic: Arithmetic | None) -> float:
    if arithmetic is not None and arithmetic.roundoffs is not None:
        return max(arithmetic.roundoffs.all)
    # Models keep casts to float32 inside a float64 run.
    return max(UNIT_ROUNDOFF.get(rung, UNIT_ROUNDOFF["bfloat16"]), UNIT_ROUNDOFF["float32"])


def _is_coarse(unit: float) -> bool:
    return unit >= min(UNIT_ROUNDOFF[name] for name in HALF)


def _floor(rung: str, n_layers: int, arithmetic: Arithmetic | None) -> float:
    unit = _unit(rung, arithmetic)
    return (_ROUNDINGS_HALF if _is_coarse(unit) else _ROUNDINGS) * math.sqrt(n_layers + 1.0) * unit


def _product(arithmetic: Arithmetic) -> float:
    unit = _unit(arithmetic.dtype, arithmetic)
    return (_PRODUCT_HALF if _is_coarse(unit) else _PRODUCT) * unit


def _is_random(key: _Key, found: Difference, run: Run) -> bool:
    rung = key[0]
    return not found.size <= _floor(rung, run.info.n_layers, run.info.arithmetic if rung == run.info.dtype else None)


def _random(key: _Key, found: Difference, run: Run, in_decode_alone: bool) -> str:
    rung, _, name = key
    bound = _floor(rung, run.info.n_layers, run.info.arithmetic if rung == run.info.dtype else None)
    text = (
        f"two runs of one pass differ: {name} of {found.address.prompt} ran twice at {rung} on the same tokens, and "
        f"its logits are off by {found.size:.2g}, where rounding explains at most {bound:.2g}; "
    )
    if in_decode_alone:
        return text + (
            "prefill gives the same bits each time, so decode alone draws random numbers, keeps state between its "
            "calls, or reads what is still being written"
        )
    return text + (
        "the model draws random numbers or keeps state between its calls, so nothing that differs between prefill and "
        "decode can be judged. Switch off what is random in it (dropout, layers that are skipped, noise), or what it "
        "keeps"
    )


def _repeat_evidence(noise: float, random: str | None) -> Evidence:
    text = random or (
        "each pass ran twice and gave the same bits"
        if noise == 0.0
        else f"the engine is not deterministic: two runs of one pass differ by up to {noise:.2g}, taken as noise"
    )
    return Evidence(
        instrument="repeat",
        mode=None,
        statistic_name="largest difference of logits between two runs of one pass",
        statistic=noise,
        valid=random is None,
        reason=random,
        text=text,
    )


def _evidence(size: float, bound: float, supports: str, text: str) -> Evidence:
    return Evidence(
        instrument="unobserved",
        mode=None,
        statistic_name="largest difference of logits between a recorded pass and the same pass unobserved",
        statistic=size,
        bound=bound,
        supports=supports,  # type: ignore[arg-type]
        minimum_detectable=bound,
        text=text,
    )
