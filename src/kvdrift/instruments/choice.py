"""Choices: whether a generation loop took the token that the values of a plain prefill call for.

The most likely token can only turn from one route to another if the gap between the two tokens is at most twice the
drift of the logits: each of the two moves by that much at most. So a choice that prefill's logits do not call for is

* a **near tie** where the gap is within twice the drift of that position, and that drift is rounding. It is named and
  informs: whether the drift is rounding is for the other instruments, as with every other impact on logits. Where they
  say that it is not rounding, the choice is a consequence of the fault, and not called a near tie.
* a **wrong choice** where it is not. Then the logits of both routes put another token first, and more clearly than the
  routes differ: no rounding of the routes lies between logits and token, so none explains it. What fails is behind the
  logits (a processor that was not asked for, the bookkeeping of beams, a draft that was accepted though it is wrong),
  which no drift of any tensor shows. This alone makes a MISMATCH: the tensors of such a run are right, and its tokens
  are not.

Beams are judged by their scores, the sums of log-probabilities that prefill gives: the returned ones come in their
order, and none is surpassed by a returned beam with another last token. How beams died on the way is not seen.

Blind to wrong choices that the drift covers, and to a loop whose logits are wrong on both routes. Logits that are not
finite are counted elsewhere and judged by nobody here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen
from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import CHOICE, Evidence
from kvdrift.vocabulary.plan import PairRole
from kvdrift.vocabulary.sites import Site

GREEDY = "greedy"

# A loop adds up the scores of beams in float32. One step rounds the log-probability (its exponentials are summed in
# pairs, so that a vocabulary of 2^18 costs 18 roundings of a sum whose logarithm is taken, plus one each of logarithm
# and difference) and the sum so far, a few times each.
_FLOAT32 = 2.0**-24
_ROUNDINGS = 20.0

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice that prefill's values do not call for.

    Attributes:
        address: the logits from which it was chosen.
        chosen: the token that was taken.
        better: the token that prefill puts first.
        gap: how far `better` is above it, in logits, or in log-probabilities for beams.
        noise: the largest gap that the drift of the routes could turn.
        text: the choice in words.
    """

    address: Address
    chosen: int
    better: int
    gap: float
    noise: float
    text: str

    @property
    def is_wrong(self) -> bool:
        """Whether the drift cannot have turned it."""
        return not self.gap <= self.noise


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a beam: log-probability of the token taken, the largest drift of any, and at the last step all."""

    position: int
    taken: float
    drift: float
    all: _Floats | None = None


@dataclass(slots=True)
class ChoiceTable:
    """The choices of one scenario at the native dtype."""

    compared: int = 0
    turned: list[Choice] = field(default_factory=list)
    beams: dict[str, list[tuple[str, tuple[int, ...], list[_Step]]]] = field(default_factory=dict)

    def add(self, pair: PassPair, choice: str) -> None:
        """Take in the choices behind the compared positions of one pair; `choice` is that of its segment."""
        tokens, name = pair.decode.tokens, pair.decode.prompt
        first, second = _logits(pair.prefill), _logits(pair.decode)
        steps = []
        for position in sorted(pair.positions):
            if position + 1 >= len(tokens) or position not in first or position not in second:
                continue
            prefill, decode = first[position], second[position]
            drift = _largest(prefill, decode)
            if not np.isfinite(drift):
                continue
            taken = tokens[position + 1]
            self.compared += 1
            if choice == GREEDY:
                self._add_greedy(Address(name, position, None, Site.LOGITS), prefill, taken, drift)
            else:
                steps.append(_step(position, prefill, decode, taken, is_last=position + 2 == len(tokens)))
        if choice != GREEDY:
            self.beams.setdefault(choice, []).append((name, tokens, steps))

    def _add_greedy(self, address: Address, prefill: _Floats, taken: int, drift: float) -> None:
        better = int(prefill.argmax())
        gap = float(prefill[better] - prefill[taken])
        if gap > 0.0:
            text = f"token {taken} was taken at {address}, and prefill puts {better} {gap:.2g} above it"
            self.turned.append(_choice(address, taken, better, gap, 2.0 * drift, text))

    def all_turned(self) -> list[Choice]:
        """Return every choice that prefill's values do not call for, wrong ones first, then by size."""
        found = [*self.turned, *(turned for group in self.beams.values() for turned in _beams(group))]
        return sorted(found, key=lambda item: (not item.is_wrong, item.address.position))


def judge_choices(table: ChoiceTable, mode: str, *, is_rounding: bool) -> Evidence | None:
    """Return what was seen of the choices, None where none was to be judged; `is_rounding` says whether the drift of
    the scenario is known to be nothing else."""
    if not table.compared:
        return None
    turned = table.all_turned()
    wrong = [item for item in turned if item.is_wrong]
    kinds = ["wrong" if item.is_wrong else ("near tie" if is_rounding else "turned by drift") for item in turned]
    text = f"prefill's logits call for all {table.compared} choices of the generation loop"
    if turned:
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        text = f"of {table.compared} choices of the generation loop prefill's logits do not call for {len(turned)} "
        text += f"({counts}); first: {turned[0].text}"
    return Evidence(
        instrument=CHOICE,
        mode=mode,
        statistic_name="largest gap of a choice that turned, over what the drift of the logits can turn",
        statistic=max((item.gap / item.noise if item.noise else np.inf for item in turned), default=0.0),
        bound=1.0,
        supports="H1" if wrong else None,
        text=text,
        detail={
            "n_compared": table.compared,
            "turned": [
                {
                    "address": str(item.address),
                    "position": item.address.position,
                    "chosen": item.chosen,
                    "better": item.better,
                    "gap": item.gap,
                    "noise": item.noise,
                    "kind": kind,
                    "text": item.text,
                }
                for item, kind in zip(turned, kinds, strict=True)
            ],
        },
    )


def _logits(trace: Trace) -> dict[int, _Floats]:
    """Return the logits by position, as the loop reads them: in float32, the dtype in which it compares them."""
    found: dict[int, _Floats] = {}
    for record in trace.rows:
        if record.site is Site.LOGITS:
            for index, position in enumerate(record.positions):
                found[position] = record.values[index].astype(np.float32).astype(np.float64)
    return found


def _choice(address: Address, chosen: int, better: int, gap: float, noise: float, text: str) -> Choice:
    return Choice(address, chosen, better, gap, noise, f"{text}; the drift of the logits can turn {noise:.2g}")


def _largest(first: _Floats, second: _Floats) -> float:
    """Return the largest difference; tokens that are impossible in both, with -inf, do not differ."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.where(first == second, 0.0, second - first)).max())


def _log_softmax(logits: _Floats) -> _Floats:
    shifted = logits - logits.max()
    with np.errstate(divide="ignore"):  # a token that is impossible has -inf
        normalised: _Floats = shifted - np.log(np.exp(shifted).sum())
    return normalised


def _step(position: int, prefill: _Floats, decode: _Floats, taken: int, *, is_last: bool) -> _Step:
    first, second = _log_softmax(prefill), _log_softmax(decode)
    return _Step(position, float(first[taken]), _largest(first, second), first if is_last else None)


def _beams(beams: list[tuple[str, tuple[int, ...], list[_Step]]]) -> list[Choice]:
    """Return what is wrong, or nearly tied, with the returned beams of one loop, the best first."""
    found = []
    scores = [sum(step.taken for step in steps) for _, _, steps in beams]
    noise = [
        sum(step.drift + _FLOAT32 * (_ROUNDINGS + 4.0 * abs(score)) for step in steps)
        for score, (_, _, steps) in zip(scores, beams, strict=True)
    ]
    returned = {tokens for _, tokens, _ in beams}
    for index, ((name, tokens, steps), (_, after, _)) in enumerate(pairwise(beams)):
        gap = scores[index + 1] - scores[index]
        if gap > 0.0 and steps:
            address = Address(name, steps[-1].position, None, Site.LOGITS)
            text = f"{name} was returned before the next beam, which prefill puts {gap:.2g} above it"
            found.append(_choice(address, tokens[-1], after[-1], gap, noise[index] + noise[index + 1], text))
    worst = int(np.argmin(scores))
    for index, (name, tokens, steps) in enumerate(beams):
        last = steps[-1].all if steps else None
        if last is None:
            continue
        others = last.copy()
        others[[seen[-1] for seen in returned if seen[:-1] == tokens[:-1]]] = -np.inf
        better = int(others.argmax())
        gap = scores[index] - steps[-1].taken + float(others[better]) - scores[worst]
        if gap > 0.0:
            address = Address(name, steps[-1].position, None, Site.LOGITS)
            text = f"{name} with {better} as its last token was not returned, {gap:.2g} above one that was by prefill"
            found.append(_choice(address, beams[worst][1][-1], better, gap, noise[index] + noise[worst], text))
    return found


@dataclass(slots=True)
class Choices:
    """Looks at the tokens that a generation loop chose; judged when it is known whether the drift is rounding."""

    name: ClassVar[str] = CHOICE
    judges: ClassVar[Judges] = "verdict"
    table: ChoiceTable = field(default_factory=ChoiceTable)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Look at the choices behind the compared positions of a native pair."""
        choice = run.choices.get(item.pair.decode.prompt)
        if choice and item.role is PairRole.PAIR and item.pair.decode.rung == run.info.dtype:
            self.table.add(item.pair, choice)

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Say nothing by itself: `judge_choices` needs the verdict."""
        return NOTHING
