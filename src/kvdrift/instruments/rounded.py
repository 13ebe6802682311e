"""Which pass rounds the scores of its attention to half precision at the finest rung, and nothing that goes into them.

A kernel that knows one dtype of 16 bits rounds all that it is given, and its scores are off by as much as those of one
that computes its softmax in that dtype. So the size of its noise tells neither. What was rounded does: attention is
computed again in float64 from the operands that the pass itself used, and once more with its scores rounded. Rounded
scores are then those of the pass, or its context, and those of a kernel that rounds its operands are not.

It looks only where noise of one pass alone begins inside attention. Blind to kernels that round both, to a softmax
whose terms or sums alone are rounded, and where scores are so small that rounding of probabilities moves as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen
from kvdrift.instruments.noise import find_noise, noise_in
from kvdrift.instruments.replay import captured_of
from kvdrift.pairing.floors import SIDES, Side
from kvdrift.replay.attention import Floats, Operands, attend, context_of, probabilities_of
from kvdrift.trace.model import PassPair
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import PairRole
from kvdrift.vocabulary.sites import Site

_HALF: dict[str, type] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# The share of the squared error that rounded scores must explain. Rounding of operands, of probabilities or of sums
# puts errors elsewhere: of n elements they explain about 1 / n.
_EXPLAINED = 0.8


class _OfScores(NamedTuple):
    mode: str
    layer: int
    side: Side
    dtype: str
    form: int
    at: Site


@dataclass(slots=True)
class _SquaredErrors:
    """The squared error of a pass against float64 attention, and against the same with rounded scores."""

    total: float = 0.0
    left: float = 0.0
    where: Address | None = None

    @property
    def explained(self) -> float:
        """The share of the squared error that rounding explains; 0 without an error."""
        return 1.0 - self.left / self.total if self.total > 0.0 and np.isfinite(self.left) else 0.0


class Rounded(NamedTuple):
    """Scores that one pass rounds: to which dtype, first where, and the share of the squared error that it explains."""

    side: Side
    dtype: str
    address: Address
    explained: float


@dataclass(slots=True)
class RoundedScores:
    """Finds the pass that rounds its scores; `Seen.found` is a tuple of `Rounded`, one for each layer."""

    name: ClassVar[str] = "rounded_scores"
    judges: ClassVar[Judges] = "mode"
    sums: dict[_OfScores, _SquaredErrors] = field(default_factory=dict)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Look at a clean pair of the finest rung, in the layers where noise of one pass begins inside attention."""
        mode = item.pair.mode
        fine = item.role is PairRole.PAIR and item.pair.prefill.rung == run.info.ladder.upper
        if not fine or run.plan.ladder == "off" or not run.floors.has(mode):
            return
        layers = {
            coarse.place.layer
            for coarse in find_noise(run.floors, mode, run.info.arithmetic).begins
            if coarse.is_inside_attention
        }
        for layer in layers - {None}:
            assert layer is not None
            self._add(item.pair, layer)

    def _add(self, pair: PassPair, layer: int) -> None:
        spec = pair.prefill.attention.get(layer)
        if spec is None or spec.is_biased:
            return
        for side, captured in zip(SIDES, captured_of(pair), strict=True):
            for position in pair.positions:
                operands, context = captured.operands(layer, position, spec), captured.context(layer, position)
                if isinstance(operands, str) or context is None:
                    continue
                if context.size != operands.query.shape[0] * operands.values.shape[2]:
                    continue  # values are expanded behind attention
                address = Address(pair.decode.prompt, position, layer, Site.ATTN_SCORES)
                scores = None if spec.slopes is not None else captured.scores(layer, position, operands.slots)
                for dtype, form, at, total, left in _errors(operands, context, scores):
                    found = self.sums.setdefault(_OfScores(pair.mode, layer, side, dtype, form, at), _SquaredErrors())
                    found.total, found.left = found.total + total, found.left + left
                    found.where = found.where or address

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Name the pass that rounds its scores where the other one does not."""
        inside = {item.place.layer: item for item in noise_in(panel, mode).begins if item.is_inside_attention}
        if not inside:
            return NOTHING
        best = {(layer, side): self._best(mode, layer, side) for layer in inside if layer is not None for side in SIDES}
        found = []
        for (layer, side), mine in best.items():
            other = best[layer, SIDES[side == SIDES[0]]]
            is_alone = other is None or other[1].explained < _EXPLAINED
            if mine is not None and mine[1].where is not None and mine[1].explained >= _EXPLAINED and is_alone:
                first = mine[1].where
                address = Address(first.prompt, first.position, layer, inside[layer].place.site)
                found.append(Rounded(side, mine[0].dtype, address, mine[1].explained))
        shares = [entry[1].explained for entry in best.values() if entry is not None]
        text = "no pass rounds the scores of its attention alone"
        if found:
            side, dtype, address, explained = found[0]
            text = (
                f"{side} rounds the scores of its attention to {dtype} in {len(found)} layers, and not what goes into "
                f"them ({explained:.2%} of the squared error in the layer of {address})"
            )
        evidence = Evidence(
            instrument=self.name,
            mode=mode,
            statistic_name="share of the squared error inside attention that rounded scores explain",
            statistic=max(shares, default=None),
            bound=_EXPLAINED,
            supports="H1" if found else None,
            text=text,
            detail={"guilty": found[0].side} if found else {},
        )
        begins = tuple(item.address for item in found)
        return Seen(evidence=(evidence,), begins=begins, beyond=begins, found=tuple(found))

    def _best(self, mode: str, layer: int, side: Side) -> tuple[_OfScores, _SquaredErrors] | None:
        of_side = [item for item in self.sums.items() if item[0][:3] == (mode, layer, side)]
        return max(of_side, key=lambda item: item[1].explained, default=None)


def _errors(
    operands: Operands, context: Floats, scores: tuple[Floats, NDArray[np.intp]] | None
) -> Iterator[tuple[str, int, Site, float, float]]:
    """The squared error of a pass, and what of it is left where scores are rounded: dtype, form, site, both."""
    exact = attend(operands)
    wrong = context.reshape(exact.context.shape)
    given = _capped(operands, exact.raw)
    whole = operands.changed(attention=msgspec.structs.replace(operands.attention, softcap=None))
    for dtype, kind in _HALF.items():
        for form, rounded in enumerate(_forms(operands, exact.raw, kind)):
            predicted = context_of(operands, probabilities_of(whole, rounded))
            yield dtype, form, Site.ATTN_CTX, _squares(wrong - exact.context), _squares(wrong - predicted)
            if scores is not None:
                seen, columns = scores
                told = np.isfinite(seen)
                error, left = (np.where(told, seen - of[:, columns], 0.0) for of in (given, rounded))
                yield dtype, form, Site.ATTN_SCORES, _squares(error), _squares(left)


def _forms(operands: Operands, raw: Floats, kind: type) -> Iterator[Floats]:
    """Scores that are rounded as they go into softmax; the product as well, before it is scaled; or that alone."""
    scale = operands.attention.scale

    def cut(values: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(values.astype(kind).astype(np.float64))

    yield cut(_capped(operands, raw))
    yield cut(_capped(operands, cut(raw / scale) * scale))
    yield _capped(operands, cut(raw / scale) * scale)


def _capped(operands: Operands, raw: Floats) -> Floats:
    cap = operands.attention.softcap
    return raw if cap is None else cap * np.tanh(raw / cap)


def _squares(values: Floats) -> float:
    return float(np.sum(values**2))
