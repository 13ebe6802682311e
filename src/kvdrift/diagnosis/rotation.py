"""Explanations of a wrong rotation: at which position, with which frequencies, or not at all.

Rotary embedding turns pairs of elements by an angle proportional to the position (Su et al. 2021, section 3.2.2). What
the model's angles are is read off prefill itself: the complex ratio of a pair after and before rotation. Nothing is
assumed of the base or its scaling; the layout of the pairs (halves or neighbours, of the whole head or of its first
part) is the one under which all heads of prefill are turned alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from kvdrift.diagnosis.apart import explain_turned_apart
from kvdrift.diagnosis.model import EXACT, GENERAL, LEAST_ENOUGH, Candidate, Floats, Indices, Suspect, Values, share
from kvdrift.diagnosis.norms import explain_norm
from kvdrift.diagnosis.pairwise import Layout, TurnedHeads, explain_other_elements, explain_pairs
from kvdrift.diagnosis.plain import ROUNDED
from kvdrift.diagnosis.slots import shared_rows
from kvdrift.diagnosis.written import with_written_keys
from kvdrift.replay.turns import Complex, pairs_of, step_of
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site

_BEFORE = {Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}
_FAR = 4096  # positions tried to either side
_NEAR = 4  # the same, where one of two tables alone is another one
_LARGEST_BASE = 7.0  # logarithm of the largest factor of the base that is tried
# Rounding of tables and products may leave this many unit roundoffs of a rotated vector unexplained.
_ROUNDINGS = 8.0
# Keys from which on angles that all of them share are no fit of a few numbers.
_FEWEST_KEYS = 4
# The fastest pair turns by a radian from one position to the next.
_LEAST_TURN = 0.1
# A pair that turns by less does not.
_STANDS = 1e-3
# By how many radians the angle of a position may be off in 16 bits, and in float32 or finer.
_ROOM, _ROOM_FINE = 0.5, 1e-3


def explain_rotation(suspect: Suspect) -> Iterator[Candidate]:
    """Yield how decode may have rotated its queries or keys."""
    if suspect.address.site is Site.K_CACHE:
        yield from _read_turned(suspect)
        suspect = with_written_keys(suspect) or suspect
    if suspect.address.site not in _BEFORE:
        return
    for dim in _head_dims(suspect):
        heads = _differing_heads(suspect, dim)
        for rotated in dict.fromkeys((dim, dim // 2, dim // 4, _n_changed(suspect, dim))):
            for halves in (True, False):
                layout = _layout(suspect, dim, rotated, halves, heads)
                if layout is not None:
                    found = _explain(suspect, layout)
                    of = f" (of the heads {heads.tolist()})" if heads is not None else ""
                    yield from (replace(item, text=item.text + of) for item in found)
                    return
    yield from explain_turned_apart(suspect, _unit(suspect))


def _n_changed(suspect: Suspect, dim: int) -> int:
    """How many elements from the first on prefill changes in some head at some position, 0 if nothing shows it."""
    last = -1
    for position in suspect.positions:
        plain, right = (
            _unrotated(suspect.prefill, suspect.address.site, position),
            suspect.prefill.at(suspect.address.site, position),
        )
        if plain is not None and right is not None and plain.size == right.size and plain.size % dim == 0:
            changed = np.flatnonzero((plain.reshape(-1, dim) != right.reshape(-1, dim)).any(axis=0))
            last = max(last, int(changed.max(initial=-1)))
    return last + 1


def _read_turned(suspect: Suspect) -> Iterator[Candidate]:
    """Keys that are rotated where they are read, or that were when they were moved: all keys, or those that differ, are
    turned by the same angles more than in prefill."""
    shared = shared_rows(suspect)
    if shared is None:
        return
    of_all = slice(None) if shared.all_differ else shared.bad
    sides = shared.prefill[of_all], shared.decode[of_all]
    n_keys, _, dim = sides[0].shape
    if n_keys < _FEWEST_KEYS:
        return
    for rotated in (dim, dim // 2, dim // 4):
        for halves in (True, False):
            if rotated < 2 or rotated % 2:
                continue
            right, wrong = (pairs_of(rows[..., :rotated].ravel(), rotated, halves) for rows in sides)
            angles = np.angle(np.sum(wrong * right.conj(), axis=0))
            if not np.abs(angles).max() > _LEAST_TURN:
                continue  # rounding turns a little
            predicted = right * np.exp(1j * angles)[None]
            rest = [rows[..., rotated:] for rows in sides]
            explained = share(
                *(
                    _with_rest(pairs, other)
                    for pairs, other in ((right, rest[0]), (wrong, rest[1]), (predicted, rest[0]))
                )
            )
            which = f"its {n_keys} keys" if shared.all_differ else f"{n_keys} of its {len(shared.slots)} keys"
            text = (
                f"decode reads {which} turned by the same angles, as if the positions of these keys alone were counted "
                "from another token on"
            )
            yield Candidate(explained, Cause.ROPE_POSITION_OFFSET_K, text)


def _with_rest(pairs: Complex, rest: Floats) -> Floats:
    return np.concatenate([_real(pairs), rest.ravel()])


def _differing_heads(suspect: Suspect, dim: int) -> Indices | None:
    """The heads that differ at the first failing position, None if all do."""
    site, position = suspect.address.site, suspect.address.position
    sides = [values.at(site, position) for values in (suspect.prefill, suspect.decode)]
    if sides[0] is None or sides[1] is None or sides[0].size != sides[1].size or sides[0].size % dim:
        return None
    pairs = zip(sides[0].reshape(-1, dim), sides[1].reshape(-1, dim), strict=True)
    differs = np.array([not _equal(_unit(suspect), right, wrong) for right, wrong in pairs])
    return None if differs.all() or not differs.any() else np.flatnonzero(differs)


def _explain(suspect: Suspect, layout: Layout) -> Iterator[Candidate]:
    what = "query" if suspect.address.site is Site.Q_ROPE else "key"
    yield from _offset(suspect, layout, what)
    if what == "key":
        # Tables may carry a factor beside their angles, which a second rotation applies again.
        twice = layout.explained(lambda turn: layout.factor * turn.right * np.exp(1j * turn.angle)[None])
        yield Candidate(twice, Cause.ROPE_TWICE_ON_K, "decode rotates its key twice")
    yield from _rotated_part_scaled(layout, what)
    yield from _lost_pairs(layout)
    yield from _rounded(layout)
    yield from _interleaved(suspect, layout)
    yield from _rescaled(layout, what)
    yield from _rebased(layout, what)
    yield from _mixed_tables(layout, what)
    yield from _norm_behind(suspect, layout, what)
    yield from _norm_in_front(suspect, layout)
    yield from explain_pairs(layout, what)
    yield from explain_other_elements(layout, what)
    yield from _scaled_angles(layout, what)
    angles = {turn.position: np.angle(turn.turned) for turn in layout.turns}
    yield Candidate(
        layout.explained(lambda turn: layout.factor * turn.before * np.exp(1j * angles[turn.position])[None]) - 1e-4,
        Cause.ROPE_ANGLES,
        f"decode rotates its {what} by other angles than prefill",
        GENERAL,
    )


def _scaled_angles(layout: Layout, what: str) -> Iterator[Candidate]:
    """Other angles and another factor beside, one for all pairs and positions, as of a layer that decode rotates where
    prefill scales alone."""
    before = np.concatenate([turn.before.ravel() for turn in layout.turns])
    turned = [turn.before * np.exp(1j * np.angle(turn.turned))[None] for turn in layout.turns]
    along = sum(float((t.wrong * v.conj()).real.sum()) for t, v in zip(layout.turns, turned, strict=True))
    factor = along / float((np.abs(before) ** 2).sum())
    by_position = {turn.position: values for turn, values in zip(layout.turns, turned, strict=True)}
    still = all(bool((np.abs(turn.angle) < _STANDS).all()) for turn in layout.turns)
    text = f"decode rotates its {what} by other angles than prefill, and times {factor / layout.factor:.6g}"
    if still:
        text = f"decode rotates its {what}, which prefill does not, and multiplies it by {factor / layout.factor:.6g}"
    explained = layout.explained(lambda turn: factor * by_position[turn.position]) - 1.5e-4
    scaled = layout.explained(lambda turn: factor * turn.before * np.exp(1j * turn.angle)[None])
    if explained >= LEAST_ENOUGH and explained > scaled:  # a factor alone has a name of its own
        yield Candidate(explained, Cause.ROPE_ANGLES, text, GENERAL)


def _offset(suspect: Suspect, layout: Layout, what: str) -> Iterator[Candidate]:
    """A rotation as of another position; where decode stands is read from all frequencies together."""
    found: dict[int, int] = {}
    for turn in layout.turns:
        # Below position 0 too: positions that are counted from a later token on are negative.
        offsets = np.arange(-_FAR, _FAR + 1)
        gap = np.angle(turn.turned)[None] - turn.angle[None] - offsets[:, None] * layout.step[None]
        found[turn.position] = int(offsets[int(np.argmax((np.abs(turn.turned) * np.cos(gap)).sum(axis=1)))])
    offset = found[layout.turns[0].position]
    if offset:
        explained = layout.explained(lambda turn: turn.right * np.exp(1j * found[turn.position] * layout.step)[None])
        yield Candidate(explained, *_name_offset(suspect, what, offset), EXACT)


def _name_offset(suspect: Suspect, what: str, offset: int) -> tuple[Cause, str]:
    """A rotation at another position, and the special ones: none at all, twice, of one of the two only."""
    position, site = suspect.address.position, suspect.address.site
    is_query = site is Site.Q_ROPE
    other = Site.K_ROPE if is_query else Site.Q_ROPE
    both = [values.at(other, position) for values in (suspect.prefill, suspect.decode)]
    alone = both[0] is not None and both[1] is not None and _equal(_unit(suspect), both[0], both[1])
    if offset == -position and alone:
        return Cause.ROPE_MISSING_ON_Q if is_query else Cause.ROPE_MISSING_ON_K, f"decode does not rotate its {what}"
    if offset == position and not is_query and alone:
        return Cause.ROPE_TWICE_ON_K, "decode rotates its key twice"
    text = f"decode rotates its {what} as if at position {position + offset} instead of {position}"
    if not is_query:
        return Cause.ROPE_POSITION_OFFSET_K, text
    return Cause.ROPE_POSITION_OFFSET_Q if alone else Cause.ROPE_POSITION_OFFSET, text


def _unit(suspect: Suspect) -> float:
    """The roundoff of a rotation: of values as coarse as float32 at least, since many engines compute the angles and
    their tables in float32, whatever else they compute in."""
    return max(suspect.unit, UNIT_ROUNDOFF["float32"])


def _equal(unit: float, prefill: Floats, decode: Floats) -> bool:
    room = _ROUNDINGS * unit
    return bool(np.linalg.norm(decode - prefill) <= room * np.linalg.norm(prefill))


def _rotated_part_scaled(layout: Layout, what: str) -> Iterator[Candidate]:
    """The elements that are rotated have another factor, and the others have not."""
    if layout.rotated == layout.dim:
        return
    along = sum(float((turn.wrong * turn.right.conj()).real.sum()) for turn in layout.turns)
    factor = along / sum(float((np.abs(turn.right) ** 2).sum()) for turn in layout.turns)
    text = f"decode multiplies the {layout.rotated} elements of each head of its {what} that it rotates by {factor:.7g}"
    yield Candidate(layout.explained(lambda turn: factor * turn.right), Cause.ROPE_ATTENTION_FACTOR, text, EXACT)


def _lost_pairs(layout: Layout) -> Iterator[Candidate]:
    """Some pairs are not rotated, the others are as they should be."""
    for factor in dict.fromkeys((layout.factor, 1.0)):
        left = sum((np.abs(turn.wrong - factor * turn.before) ** 2).sum(axis=0) for turn in layout.turns)
        kept = sum((np.abs(turn.wrong - turn.right) ** 2).sum(axis=0) for turn in layout.turns)
        lost = np.asarray(left) < np.asarray(kept)
        if 0 < lost.sum() < len(lost):
            explained = layout.explained(
                lambda turn, f=factor, pairs=lost: np.where(pairs[None], f * turn.before, turn.right)  # type: ignore[misc]
            )
            cause = Cause.ROPE_PAIR_LOST if lost.sum() == 1 else Cause.ROPE_PARTIAL_DIMS
            text = f"decode does not rotate the pairs {np.flatnonzero(lost).tolist()}"
            yield Candidate(explained, cause, text)


def _rounded(layout: Layout) -> Iterator[Candidate]:
    """Tables of cosines and sines, or the frequencies behind them, or the angles, in a narrower dtype."""
    for name in ("bfloat16", "float16"):
        cut = _cut(name)

        def tables(turn: TurnedHeads, cut: Callable[[Floats], Floats] = cut) -> Complex:
            table = cut(layout.factor * np.cos(turn.angle)) + 1j * cut(layout.factor * np.sin(turn.angle))
            return np.asarray(turn.before * table[None])

        def frequencies(turn: TurnedHeads, cut: Callable[[Floats], Floats] = cut) -> Complex:
            return np.asarray(layout.factor * turn.before * np.exp(1j * turn.position * cut(layout.step))[None])

        def angles(turn: TurnedHeads, cut: Callable[[Floats], Floats] = cut) -> Complex:
            angle = cut(float(cut(np.float64(turn.position))) * cut(layout.step))  # type: ignore[arg-type]
            table = cut(np.cos(angle)) + 1j * cut(np.sin(angle))
            return np.asarray(layout.factor * turn.before * table[None])

        yield Candidate(
            layout.explained(tables), Cause.ROPE_TABLES_ROUNDED, f"decode rounds its tables to {name}", EXACT
        )
        for how, text in ((frequencies, "frequencies"), (angles, "angles")):
            yield Candidate(
                layout.explained(how), Cause.ROPE_FREQUENCIES_ROUNDED, f"decode rounds its {text} to {name}", EXACT
            )


def _cut(name: str) -> Callable[[Floats], Floats]:
    return lambda values: np.asarray(values).astype(ROUNDED[name]).astype(np.float64)


def _interleaved(suspect: Suspect, layout: Layout) -> Iterator[Candidate]:
    """Pairs are looked for in the other layout."""
    if layout.rotated != layout.dim:
        return
    site = suspect.address.site

    def predict(turn: TurnedHeads) -> Complex:
        plain = _unrotated(suspect.prefill, site, turn.position)
        assert plain is not None
        other = pairs_of(plain, layout.dim, not layout.halves) * layout.factor * np.exp(1j * turn.angle)[None]
        return pairs_of(_flat(other, layout.dim, not layout.halves), layout.dim, layout.halves)

    def mixed(turn: TurnedHeads) -> Complex:
        """Tables as prefill has them, and the other elements for their sines."""
        plain = _unrotated(suspect.prefill, site, turn.position)
        assert plain is not None
        if plain.size != 2 * turn.right.size:  # some of the heads alone differ
            return turn.right
        table = np.broadcast_to(layout.factor * np.exp(1j * turn.angle), turn.right.shape)
        cos, sin = (_flat(part + 1j * part, layout.dim, layout.halves) for part in (table.real, table.imag))
        other = _flat(1j * pairs_of(plain, layout.dim, not layout.halves), layout.dim, not layout.halves)
        return pairs_of(plain.ravel() * cos + other * sin, layout.dim, layout.halves)

    words = ("neighbours", "halves") if layout.halves else ("halves", "neighbours")
    text = f"decode pairs {words[0]} where prefill pairs {words[1]}"
    yield Candidate(layout.explained(predict), Cause.ROPE_INTERLEAVED, text, EXACT)
    yield Candidate(layout.explained(mixed), Cause.ROPE_INTERLEAVED, f"{text}, for the sines alone", EXACT)


def _rescaled(layout: Layout, what: str) -> Iterator[Candidate]:
    """All pairs turn slower or faster by one ratio, at every position: read off from the slowest pair upwards, each
    one telling how many turns the next has made."""
    first = layout.turns[0]
    full, seen = first.position * layout.step, np.angle(first.turned)
    weight = np.abs(first.turned)
    ratio, along, size = 1.0, 0.0, 0.0
    for pair in np.argsort(np.abs(full)):
        if abs(full[pair]) < 1e-12 or weight[pair] == 0.0:
            continue
        angle = seen[pair] + (
            0.0 if size == 0.0 else 2.0 * np.pi * np.round((ratio * full[pair] - seen[pair]) / (2.0 * np.pi))
        )
        along, size = along + weight[pair] * full[pair] * angle, size + weight[pair] * full[pair] ** 2
        ratio = along / size
    if size == 0.0 or abs(ratio - 1.0) < 1e-9:
        return
    explained = layout.explained(
        lambda turn: layout.factor * turn.before * np.exp(1j * ratio * turn.position * layout.step)[None]
    )
    text = f"decode rotates its {what} by other angles than prefill: all slower or faster by {ratio:.4g}"
    yield Candidate(explained, Cause.ROPE_SCALING, text)


def _rebased(layout: Layout, what: str) -> Iterator[Candidate]:
    """The base is another one: pair i of n turns by b^(-i/n) as fast, with one b for all of them."""
    exponent = -np.arange(len(layout.step)) / len(layout.step)

    def fit(log_base: Floats) -> Floats:
        total = np.zeros(len(log_base))
        for turn in layout.turns:
            wanted = turn.position * layout.step[None] * np.exp(log_base[:, None] * exponent[None])
            total += (np.abs(turn.turned)[None] * np.cos(np.angle(turn.turned)[None] - wanted)).sum(axis=1)
        return total

    low, high, count = -_LARGEST_BASE, _LARGEST_BASE, 4001
    best = 0.0
    for _ in range(8):
        grid = np.linspace(low, high, count)
        index = int(np.argmax(fit(grid)))
        best, width = float(grid[index]), (high - low) / (count - 1)
        low, high, count = best - width, best + width, 201
    if abs(best) < 1e-6:
        return
    explained = layout.explained(
        lambda turn: (
            layout.factor * turn.before * np.exp(1j * turn.position * layout.step * np.exp(best * exponent))[None]
        )
    )
    text = (
        f"decode rotates its {what} by other angles than prefill: another base or table ({np.exp(best):.4g} times the "
        "base)"
    )
    yield Candidate(explained, Cause.ROPE_BASE, text)


def _mixed_tables(layout: Layout, what: str) -> Iterator[Candidate]:
    """Cosines of the right position and sines of another one, or the other way round."""
    for offset in (o for o in range(-_NEAR, _NEAR + 1) if o):

        def of_sines(turn: TurnedHeads, offset: int = offset) -> Complex:
            other = turn.angle + offset * layout.step
            return np.asarray(layout.factor * turn.before * (np.cos(turn.angle) + 1j * np.sin(other))[None])

        def of_cosines(turn: TurnedHeads, offset: int = offset) -> Complex:
            other = turn.angle + offset * layout.step
            return np.asarray(layout.factor * turn.before * (np.cos(other) + 1j * np.sin(turn.angle))[None])

        for name, predict in (("sines", of_sines), ("cosines", of_cosines)):
            text = f"decode rotates its {what} with the {name} of the position {offset:+d} from its own"
            yield Candidate(layout.explained(predict), Cause.ROPE_ANGLES, text, EXACT)


def _norm_behind(suspect: Suspect, layout: Layout, what: str) -> Iterator[Candidate]:
    """The norm of queries or keys comes behind their rotation, so that its weight meets turned elements. The weight is
    read off prefill: what the norm gives over what it was given, up to a factor of the head, which cancels."""
    site = suspect.address.site
    norm, projection = (Site.Q_NORM, Site.Q_PROJ) if site is Site.Q_ROPE else (Site.K_NORM, Site.K_PROJ)
    position = suspect.address.position
    after, before = (suspect.prefill.at(of, position) for of in (norm, projection))
    if after is None or before is None or after.size != before.size or layout.rotated != layout.dim:
        return
    given, normed = before.reshape(-1, layout.dim), after.reshape(-1, layout.dim)
    size = np.sqrt((given**2).mean(axis=1, keepdims=True))
    if not size.all():
        return
    # By least squares over the heads: a single element may be next to nothing.
    scaled = given / size
    weight = (normed * scaled).sum(axis=0) / np.maximum((scaled**2).sum(axis=0), np.finfo(float).tiny)
    if not weight.all():
        return
    pairs = pairs_of(weight, layout.dim, layout.halves)[0]

    def predict(turn: TurnedHeads) -> Complex:
        plain = turn.before.real / pairs.real + 1j * (turn.before.imag / pairs.imag)
        turned = layout.factor * plain * np.exp(1j * turn.angle)[None]
        return np.asarray(turned.real * pairs.real + 1j * (turned.imag * pairs.imag))

    text = f"decode rotates its {what} first and applies the norm behind"
    yield Candidate(layout.explained(predict), Cause.NORM_BEHIND_ROPE, text, EXACT)


def _norm_in_front(suspect: Suspect, layout: Layout) -> Iterator[Candidate]:
    """The norm in front of the rotation is wrong where decode computes it without its module: rows that are turned back
    show what it gave."""
    site, position = suspect.address.site, suspect.address.position
    norm = Site.Q_NORM if site is Site.Q_ROPE else Site.K_NORM
    is_bypassed = suspect.prefill.at(norm, position) is not None and suspect.decode.at(norm, position) is None
    if not is_bypassed or layout.rotated != layout.dim or layout.factor == 0.0:
        return
    shown = {
        (norm, turn.position): _flat(
            turn.wrong * np.exp(-1j * turn.angle)[None] / layout.factor, layout.dim, layout.halves
        )
        for turn in layout.turns
    }
    if any(
        (right := suspect.prefill.at(norm, at)) is None or right.size != rows.size for (_, at), rows in shown.items()
    ):
        return  # some of the heads alone differ
    decode = replace(suspect.decode, sites={**suspect.decode.sites, **shown})
    for item in explain_norm(replace(suspect, address=suspect.address._replace(site=norm), decode=decode)):
        yield replace(item, text=f"{item.text} (told from what was rotated, since decode does not call its module)")


def _layout(suspect: Suspect, dim: int, rotated: int, halves: bool, heads: Indices | None = None) -> Layout | None:
    """Return how prefill rotates its `heads` (None: all), None if it does not rotate pairs of this layout."""
    site = suspect.address.site
    if rotated < 2 or rotated % 2:
        return None
    turns = {}
    for position in suspect.positions:
        plain = _unrotated(suspect.prefill, site, position)
        right, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
        if plain is None or right is None or wrong is None or not plain.size == right.size == wrong.size:
            continue
        before, right, wrong = (
            v.reshape(-1, dim)[slice(None) if heads is None else heads] for v in (plain, right, wrong)
        )
        pairs, after, seen = (pairs_of(v[:, :rotated].ravel(), rotated, halves) for v in (before, right, wrong))
        turns[position] = TurnedHeads(position, pairs, after, seen, (right[:, rotated:], wrong[:, rotated:]))
        if not _equal(_unit(suspect), before[:, rotated:], right[:, rotated:]):
            return None
    if suspect.address.position not in turns:
        return None
    sizes = [
        sum(float((np.abs(pairs) ** 2).sum()) for pairs in many)
        for many in ([t.before for t in turns.values()], [t.right for t in turns.values()])
    ]
    if sizes[0] == 0.0:
        return None
    factor = float(np.sqrt(sizes[1] / sizes[0]))
    room = (_ROUNDINGS * _unit(suspect)) ** 2 * sizes[1]
    left = sum(
        float((np.abs(t.right - factor * t.before * np.exp(1j * t.angle)[None]) ** 2).sum()) for t in turns.values()
    )
    # Tables may keep 16 bits on a finer rung too: of a model's own buffers the values are what they are.
    has_tables = left > max(room, 1e-20 * sizes[1])
    off = _ROOM_FINE if _unit(suspect) <= UNIT_ROUNDOFF["float32"] and not has_tables else _ROOM
    step = step_of({position: turn.angle for position, turn in turns.items()}, off)
    if (has_tables and left > UNIT_ROUNDOFF["bfloat16"] ** 2 * sizes[1]) or step is None:
        return None
    failing = [suspect.address.position]
    failing += [
        p for p, t in turns.items() if p not in failing and not _equal(_unit(suspect), _real(t.right), _real(t.wrong))
    ]
    return Layout(dim, halves, rotated, factor, step, tuple(turns[p] for p in failing))


def _head_dims(suspect: Suspect) -> list[int]:
    read = suspect.prefill.reads.get((Site.K_CACHE, suspect.address.position))
    plain = _unrotated(suspect.prefill, suspect.address.site, suspect.address.position)
    if read is None or plain is None or plain.size % read.rows.shape[2]:
        return []
    return [read.rows.shape[2]]


def _unrotated(values: Values, site: Site, position: int) -> Floats | None:
    return next((v for before in _BEFORE[site] if (v := values.at(before, position)) is not None), None)


def _real(pairs: Complex) -> Floats:
    return np.concatenate([pairs.real.ravel(), pairs.imag.ravel()])


def _flat(pairs: Complex, dim: int, halves: bool) -> Floats:
    heads = np.empty((len(pairs), dim))
    if halves:
        heads[:, : dim // 2], heads[:, dim // 2 :] = pairs.real, pairs.imag
    else:
        heads[:, 0::2], heads[:, 1::2] = pairs.real, pairs.imag
    return heads.ravel()
