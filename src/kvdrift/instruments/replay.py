"""Instrument 4, replay: each pass's attention against float64 attention on that pass's own captured operands.

What is left is the error that was made inside attention, on whatever bytes it was given: wrong arithmetic, apart from
wrong bytes. Two tests:

* the bound: rounding of probabilities and of the output moves an element by about u * sum |p| |v|, and rounding of
  scores by as much as the scores are large; rounding does not make an error many times that (componentwise backward
  error of inner products; Higham & Mary 2019, theorem 3.1);
* the directed tests: for each cause of the catalogue the replay gives the direction in which it moves the output. The
  error is projected on it, weighted by its noise and pooled over layers. Rounding has no preferred direction, so the
  coefficient of decode, less that of prefill, is symmetric around zero under H0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.exact import Sizes
from kvdrift.instruments.fewer_bits import as_got, measured
from kvdrift.instruments.given import ScoreCheck, compare_scores
from kvdrift.pairing.folded import Fold, folds_of
from kvdrift.pairing.kernels import as_floats
from kvdrift.pairing.rowscales import RowScales, row_scales_of
from kvdrift.pairing.slots import layers_of_two_forms
from kvdrift.replay.attention import (
    Attended,
    Floats,
    Operands,
    attend,
    visible,
)
from kvdrift.replay.casts import kept_in
from kvdrift.replay.causes import ATTENTION_CAUSES
from kvdrift.replay.eight_bits import Kernel
from kvdrift.replay.narrow import MOST_ROUNDINGS, from_scores_of
from kvdrift.replay.slips import likely_slip
from kvdrift.trace.model import Array, CacheRead, PassPair, Slots, Trace
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site

Unit = tuple[str, int]  # prompt, position: the unit of resampling


@dataclass(frozen=True, slots=True)
class Projection:
    """The error of one pass along the direction of one cause: coefficient = along / size."""

    along: float
    size: float


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """The attention error of both passes at one address.

    `error` is the root mean square of |error| / (sum |p| |v|), by pass; `projections` by cause and pass. `from_scores`
    is what rounding of the scores may add to the error of decode, in the same measure. `given` is how
    the scores of the passes compare where attention was replayed from those that its softmax got, and not from queries
    and keys; else None. `step` is the unit roundoff of a
    half dtype that attention stores its scores in, 0 where it keeps them in float32: a factor of one of its operands
    that is closer to 1 than this may change none of the numbers stored. `sizes` are the errors by pass, as those of
    exact products are measured, with one head as a block, and `relative` what an error of 1 there is of the context of
    decode; both are empty where neither dtype nor kernel is of 16 bits.
    """

    mode: str
    prompt: str
    position: int
    layer: int
    error: dict[str, float]
    projections: dict[Cause, dict[str, Projection]]
    from_scores: float = 0.0
    step: float = 0.0
    explained: dict[Cause, float] = field(default_factory=dict)  # share of decode's squared error, by cause
    slip: str = ""  # what explains both passes, where neither comes out of its operands as recorded
    sizes: dict[str, Sizes] = field(default_factory=dict)
    relative: float = 0.0
    given: ScoreCheck | None = None
    is_of_8_bits: bool = False  # whether attention of operands of 8 bits was replayed

    @property
    def unit(self) -> Unit:
        """The unit of resampling that the row belongs to."""
        return (self.prompt, self.position)


@dataclass(slots=True)
class ReplayTable:
    """Replays of a run; `abstained` says why a layer could not be replayed."""

    rows: list[ReplayRow] = field(default_factory=list)
    abstained: dict[int, str] = field(default_factory=dict)
    kernel: Kernel = field(default_factory=Kernel)

    def add(self, pair: PassPair, *, may_be_given: bool = False) -> None:
        """Replay attention of both passes of `pair` at all its positions.

        Where it does not follow from queries and keys how scores are made, attention is replayed from the scores
        themselves, if they `may_be_given`.
        """
        passes: dict[str, CapturedAttention] = dict(zip(("prefill", "decode"), captured_of(pair), strict=True))
        in_two_forms = layers_of_two_forms(pair.prefill, pair.decode)
        for layer in sorted(passes["prefill"].layers & passes["decode"].layers):
            spec = pair.prefill.attention.get(layer)
            if layer in in_two_forms:
                self.abstained[layer] = "its keys are of another shape in decode than in prefill"
                continue
            why_not = _why_unspecified(spec)
            if why_not and not may_be_given:
                self.abstained[layer] = why_not
                continue
            for position in pair.positions:
                operands = _operands_of(passes, layer, position, None if why_not else spec, may_be_given=may_be_given)
                contexts = {name: captured.context(layer, position) for name, captured in passes.items()}
                kept = passes["decode"].score_dtype(layer, position)
                row = _replay(pair, layer, position, operands, contexts, kept, self.kernel)
                if isinstance(row, ReplayRow) and _are_given(operands):
                    row = _with_scores(row, operands, pair.prefill.rung)
                if isinstance(row, str):
                    self.abstained.setdefault(layer, f"{why_not}; {row}" if why_not else row)
                else:
                    self.rows.append(row)
            pair.prefill.release_pages()
            pair.decode.release_pages()


def _why_unspecified(spec: AttentionSpec | None) -> str:
    """Why scores do not follow from queries and keys, "" if they do."""
    if spec is None:
        return "how this layer attends was not seen"
    if spec.is_biased:
        return "something is added to the scores, or keys of no token are seen, and what it is was not recorded"
    return ""


def _are_given(operands: Mapping[str, Operands | str]) -> bool:
    """Whether scores stand among the operands."""
    return any(not isinstance(each, str) and each.scores is not None for each in operands.values())


def _operands_of(
    passes: Mapping[str, CapturedAttention],
    layer: int,
    position: int,
    spec: AttentionSpec | None,
    *,
    may_be_given: bool,
) -> dict[str, Operands | str]:
    """The operands of both passes, of one form."""
    if spec is None:
        return {name: captured.given(layer, position) for name, captured in passes.items()}
    found = {name: captured.operands(layer, position, spec) for name, captured in passes.items()}
    if not may_be_given or not any(isinstance(each, str) for each in found.values()):
        return found
    masked = {name: captured.operands(layer, position, spec, as_seen=True) for name, captured in passes.items()}
    seen = [set(each.slots[visible(each)]) for each in masked.values() if not isinstance(each, str)]
    # What one pass alone does not see is a difference of the two, and no property of the layer.
    return masked if len(seen) == len(masked) and all(each == seen[0] for each in seen) else found


class CapturedAttention:
    """The operands of attention in one trace, its scores and its output, by layer and position.

    The rows that a layer read are put together when they are asked for, and those of one layer are kept at a time.
    `folds` say in which layers queries or keys hold a part of the scale: it is taken out of the query. Rows that are
    kept by `scales` of their own are divided by them.
    """

    def __init__(
        self,
        trace: Trace,
        folds: Mapping[int, Fold] | None = None,
        scales: Mapping[tuple[int, Site], RowScales] | None = None,
    ) -> None:
        self._trace, self._folds, self._scales = trace, folds or {}, scales or {}
        self._query = values_by_place(trace, Site.Q_ROPE)
        self._context = values_by_place(trace, Site.ATTN_CTX)
        self._scores = values_by_place(trace, Site.ATTN_SCORES)
        self._probs = values_by_place(trace, Site.ATTN_PROBS)
        self._slots = {
            (record.layer, position): record.slots
            for record in trace.rows
            if record.site is Site.ATTN_SCORES
            for position in record.positions
        }
        self._together = [range(call.start, call.start + call.q_len) for call in trace.calls if call.q_len > 1]
        self._layer: int | None = None
        self._reads: dict[tuple[Site, int], CacheRead] = {}
        self._converted: dict[Site, tuple[Array, Floats]] = {}
        self.layers = {layer for layer, _ in self._query if layer is not None}

    def context(self, layer: int, position: int) -> Floats | None:
        """Return the attention output [feature] in float64, None if it was not captured; NaN stays NaN."""
        found = self._context.get((layer, position))
        return None if found is None else found.astype(np.float64).reshape(-1)

    def score_dtype(self, layer: int, position: int) -> str:
        """Return the name of the dtype that scores were recorded in, float32 if they were not."""
        found = self._scores.get((layer, position))
        return "float32" if found is None else found.dtype.name

    def scores(self, layer: int, position: int, slots: Slots) -> tuple[Floats, NDArray[np.intp]] | None:
        """Return the scores [head, column] in float64, and which of `slots` each column is of; None if they were not
        captured, or are of others. Masked ones are -inf, and NaN stays NaN."""
        found, known = self._scores.get((layer, position)), self._slots.get((layer, position))
        if found is None or known is None or not len(slots):
            return None
        order = np.argsort(slots, kind="stable")
        at = order[np.minimum(np.searchsorted(slots, known, sorter=order), len(slots) - 1)]
        is_one = slots[at] == known
        return found[:, is_one].astype(np.float64), at[is_one]

    def operands(self, layer: int, position: int, spec: AttentionSpec, *, as_seen: bool = False) -> Operands | str:
        """Return the operands in float64, query [head, dim], keys and values [slot, head, dim], or why not.

        `as_seen` takes the keys that this pass saw for those that are to be seen.
        """
        query = self._query.get((layer, position))
        reads = self._reads_of(layer)
        keys, values = (reads.get((site, position)) for site in (Site.K_CACHE, Site.V_CACHE))
        if query is None or keys is None or values is None:
            return "no query, keys or values were captured"
        dim = keys.rows.shape[2]
        if query.size % dim or not np.array_equal(keys.slots, values.slots):
            return "query and keys do not fit together"
        operands = Operands(
            query.astype(np.float64).reshape(-1, dim) / self._folds.get(layer, Fold()).product,
            self._floats(keys),
            self._floats(values),
            keys.slots,
            position,
            spec,
            is_alone=not any(position in call for call in self._together),
        )
        if as_seen:
            found = self.scores(layer, position, keys.slots)
            if found is None:
                return "which keys are seen was not recorded"
            seen = np.zeros(len(keys.slots), dtype=bool)
            seen[found[1]] = ~np.isneginf(found[0]).all(axis=0)
            return operands.changed(seen=seen)
        return operands if self._sees_as_specified(operands, layer) else "the mask is not causal with this window"

    def given(self, layer: int, position: int) -> Operands | str:
        """Return the operands with the scores that the softmax of this pass got, or why not.

        What is weighed must be the softmax of these scores: where more goes into it, such as a sink, or where something
        is done to it, nothing is known of the context.
        """
        operands = self.operands(layer, position, AttentionSpec(1.0), as_seen=True)
        if isinstance(operands, str):
            return operands
        found, probs = self.scores(layer, position, operands.slots), self._probs.get((layer, position))
        assert found is not None
        if probs is None or probs.shape != found[0].shape or len(found[0]) != len(operands.query):
            return "its probabilities were not captured"
        scores = np.full((len(operands.query), len(operands.slots)), -np.inf)
        scores[:, found[1]] = found[0]
        operands = operands.changed(scores=scores)
        softmax = attend(operands).probs[:, found[1]]
        unit = UNIT_ROUNDOFF.get(probs.dtype.name, UNIT_ROUNDOFF["float32"])
        off = np.abs(softmax - probs.astype(np.float64))
        if not np.all(off <= MOST_ROUNDINGS * max(unit, UNIT_ROUNDOFF["float32"]) * softmax.max()):
            return "its probabilities are not the softmax of its scores"
        return operands

    def _floats(self, read: CacheRead) -> Floats:
        """The rows of a read in float64, which all tokens of one call share."""
        known = self._converted.get(read.site)
        if known is None or known[0] is not read.rows:
            scales = self._scales.get((read.layer, read.site))
            floats = as_floats(read.rows)
            if scales is not None:
                floats = as_floats(scales.divided(replace(read, rows=floats)).rows)
            self._converted[read.site] = known = (read.rows, floats)
        return known[1]

    def _reads_of(self, layer: int) -> dict[tuple[Site, int], CacheRead]:
        if layer != self._layer:
            self._converted.clear()
            self._layer, self._reads = layer, {}  # the old ones first, or two layers were there at once
            self._reads = {
                (read.site, position): read for read in self._trace.cache_reads(layer) for position in read.positions
            }
        return self._reads

    def _sees_as_specified(self, operands: Operands, layer: int) -> bool:
        """Whether the keys that this pass attended to are those that the specification makes visible."""
        scores, slots = self._scores.get((layer, operands.position)), self._slots.get((layer, operands.position))
        if scores is None or slots is None:
            return True
        seen = ~(scores.astype(np.float32) == -np.inf).all(axis=0)
        return set(slots[seen]) == set(operands.slots[visible(operands)])


def captured_of(pair: PassPair) -> tuple[CapturedAttention, CapturedAttention]:
    """Return the attention of prefill and of decode, with the whole scale behind the products in both."""
    folds = folds_of(pair.prefill, pair.decode, pair.positions).by_layer
    scales = row_scales_of(pair.prefill, pair.decode, pair.positions, folds)
    return CapturedAttention(pair.prefill), CapturedAttention(pair.decode, folds, scales)


def values_by_place(trace: Trace, site: Site) -> dict[tuple[int | None, int], Array]:
    """Return what a trace recorded of `site`, by layer (None outside the layers) and position, in the recorded dtype.

    Values are [feature], attention rows [head, key column]. Nothing is checked: NaN stays NaN.
    """
    return {
        (record.layer, position): record.values[index]
        for record in trace.rows
        if record.site is site
        for index, position in enumerate(record.positions)
    }


def _replay(
    pair: PassPair,
    layer: int,
    position: int,
    operands: dict[str, Operands | str],
    contexts: dict[str, Floats | None],
    scores: str,
    kernel: Kernel,
) -> ReplayRow | str:
    errors: dict[str, float] = {}
    projections: dict[Cause, dict[str, Projection]] = defaultdict(dict)
    explained: dict[Cause, float] = {}
    from_scores, relative, sizes, coarse = 0.0, 0.0, {}, 0.0
    rung = pair.prefill.rung
    narrow = None if rung in HALF else kept_in(contexts.values())
    half = rung if rung in HALF else narrow
    if is_given := _are_given(operands):
        half = None  # what a kernel may round before its scores is not known
    else:
        operands, coarse = as_got(operands, contexts, half or rung, half and (narrow or scores), kernel)
    for name, given in operands.items():
        context = contexts[name]
        if isinstance(given, str):
            return given
        if context is None or context.size != given.query.shape[0] * given.values.shape[2]:
            return "no attention context was captured"
        attended = attend(given)
        scaled, weight, errors[name] = _scaled(context, attended)
        if half is not None:
            sizes[name], relative = measured(given, attended, context, half)
        if name == "decode":
            from_scores = from_scores_of(given, attended, narrow or scores)
            from_scores += max(coarse, 0.0 if narrow is None else MOST_ROUNDINGS * UNIT_ROUNDOFF[narrow])
        for cause, direction in _directions(given, attended, of_values_alone=is_given):
            along = float(np.sum(scaled * direction * weight))
            size = float(np.sum((direction * weight) ** 2))
            projections[cause][name] = Projection(along, size)
            if name == "decode" and size > 0.0 and errors[name] > 0.0:
                explained[cause] = along**2 / size / float(np.sum(scaled**2))
    least = MOST_ROUNDINGS * UNIT_ROUNDOFF.get(pair.prefill.rung, 0.0) + from_scores
    slip = _slip(operands, contexts, least) if not min(errors.values()) <= least else ""
    return ReplayRow(
        pair.mode,
        pair.prefill.prompt,
        position,
        layer,
        errors,
        {k: dict(v) for k, v in projections.items()},
        from_scores,
        _step(scores),
        explained,
        slip,
        sizes,
        relative,
        is_of_8_bits=coarse > 0.0,
    )


def _scaled(context: Floats, attended: Attended) -> tuple[Floats, Floats, float]:
    """The error of a context [head, dim] over sum |p| |v|, by what it was multiplied, and its root mean square.

    That is infinite where something came out though nothing is seen or all values are zero.
    """
    error = context.reshape(attended.context.shape) - attended.context
    weight = np.divide(1.0, attended.magnitude, out=np.zeros_like(error), where=attended.magnitude > 0.0)
    scaled = error * weight
    is_of_nothing = bool(np.any(error[attended.magnitude == 0.0]))
    return scaled, weight, np.inf if is_of_nothing else float(np.sqrt(np.mean(scaled**2)))


def _with_scores(row: ReplayRow, operands: Mapping[str, Operands | str], rung: str) -> ReplayRow | str:
    """A row that was replayed from given scores, with how those of both passes compare, or why it says nothing."""
    prefill, decode = operands["prefill"], operands["decode"]
    if isinstance(prefill, str) or isinstance(decode, str):
        return "its scores were captured in one pass alone"
    unit = UNIT_ROUNDOFF.get(rung, UNIT_ROUNDOFF["float32"])
    if not min(row.error.values()) <= MOST_ROUNDINGS * unit + row.from_scores:
        return "in neither pass its context is that of its probabilities and values: something is done to one of them"
    found = compare_scores(prefill, decode, unit)
    return found if isinstance(found, str) else replace(row, given=found, slip="")


def _slip(operands: dict[str, Operands | str], contexts: dict[str, Floats | None], bound: float) -> str:
    """The slip of a recording that explains both passes, "" if none does."""
    found = set()
    for name, given in operands.items():
        context = contexts[name]
        if isinstance(given, str) or context is None:
            return ""
        found.add(likely_slip(given, context, bound))
    return found.pop() if len(found) == 1 else ""


def _step(kept: str) -> float:
    roundoff = UNIT_ROUNDOFF.get(kept, UNIT_ROUNDOFF["float32"])
    return roundoff if roundoff > UNIT_ROUNDOFF["float32"] else 0.0


def _directions(operands: Operands, attended: Attended, *, of_values_alone: bool) -> Iterator[tuple[Cause, Floats]]:
    for cause in ATTENTION_CAUSES:
        if of_values_alone and not cause.of_values:
            continue
        direction = cause.direction(operands, attended)
        if direction is not None and np.any(direction):
            yield cause.name, direction


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The coefficient of one cause, at one layer or pooled over all of them (layer None).

    Attributes:
        decode: coefficient [unit] of decode's error, in the unit of the cause.
        prefill: the same of prefill's error.
        size: squared length [unit] of decode's direction; an error of one roundoff in every element makes a coefficient
            of at most one roundoff over sqrt(size).
    """

    cause: Cause
    layer: int | None
    decode: NDArray[np.float64]
    prefill: NDArray[np.float64]
    size: NDArray[np.float64]


def coefficients(rows: Iterable[ReplayRow], units: Sequence[Unit]) -> list[Coefficients]:
    """Return the coefficients [unit] of every cause, at each layer and pooled over layers by least squares.

    Only causes take part that every one of `units` has a direction for. An error of NaN or infinity, which has no
    direction and is beyond the bound of replay, leaves out the causes at its layer and the pooled ones.
    """
    place = {unit: index for index, unit in enumerate(units)}
    sums: dict[tuple[Cause, int | None], NDArray[np.float64]] = defaultdict(lambda: np.zeros((2, 2, len(units))))
    for row in rows:
        for cause, by_pass in row.projections.items():
            for index, name in enumerate(("decode", "prefill")):
                found = by_pass.get(name)
                if found is not None:
                    for layer in (row.layer, None):
                        sums[cause, layer][index, :, place[row.unit]] += (found.along, found.size)
    result = []
    for (cause, layer), total in sums.items():
        along, size = total[:, 0], total[:, 1]
        if np.all(size > 0.0) and np.isfinite(along).all():
            values = along / size
            result.append(Coefficients(cause, layer, values[0], values[1], size[0]))
    return result
