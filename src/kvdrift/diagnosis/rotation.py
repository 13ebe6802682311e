"""Explanations of a wrong rotation: at which position, with which frequencies, or not at all.

Rotary embedding turns pairs of elements by an angle proportional to the position (Su et al. 2021, section 3.2.2). What
the model's angles are is read off prefill itself: the complex ratio of a pair after and before rotation. Nothing is
assumed of the base or its scaling; the layout of the pairs (halves or neighbours) is the one under which the ratios of
prefill have modulus 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvdrift.diagnosis.model import Candidate, Floats, Suspect, Values, share
from kvdrift.diagnosis.plain import ROUNDED
from kvdrift.sites import Site

Complex = NDArray[np.complex128]

_BEFORE = {Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}
_FAR = 4096  # positions tried to either side


def explain_rotation(suspect: Suspect) -> Iterator[Candidate]:
    """Yield how decode may have rotated its queries or keys."""
    site, position = suspect.address.site, suspect.address.position
    if site not in _BEFORE:
        return
    plain = _unrotated(suspect.prefill, site, position)
    rotated, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if plain is None or rotated is None or wrong is None:
        return
    for dim in _head_dims(suspect, plain.size):
        for halves in (True, False):
            yield from _explain(suspect, plain, rotated, wrong, dim, halves)


def _explain(
    suspect: Suspect, plain: Floats, rotated: Floats, wrong: Floats, dim: int, halves: bool
) -> Iterator[Candidate]:
    site, position = suspect.address.site, suspect.address.position
    steps = _angle_per_position(suspect, site, dim, halves)
    if steps is None:
        return
    before, after = _pairs(plain, dim, halves), _pairs(wrong, dim, halves)
    reference = _pairs(rotated, dim, halves)
    seen = np.sum(after * before.conj(), axis=0)
    angle = np.angle(seen)
    # Where decode stands is read from all frequencies together; the weight of a pair is its length.
    offsets = np.arange(max(-_FAR, -position), _FAR + 1)
    fits = (
        np.abs(seen)
        * np.cos(
            angle[None] - np.angle(np.sum(reference * before.conj(), axis=0))[None] - offsets[:, None] * steps[None]
        )
    ).sum(axis=1)
    offset = int(offsets[int(np.argmax(fits))])
    predicted = _flat(reference * np.exp(1j * offset * steps), dim, halves, wrong)
    what = "query" if site is Site.Q_ROPE else "key"
    by_offset = share(rotated, wrong, predicted)
    if offset:
        yield Candidate(by_offset, *_name_offset(suspect, what, offset))
    true_angle = np.angle(np.sum(reference * before.conj(), axis=0))
    turned = _flat(before * np.exp(1j * angle)[None], dim, halves, wrong)
    lost = np.flatnonzero((np.abs(angle) < 1e-9) & (np.abs(true_angle) > 1e-6))
    right = np.abs(np.exp(1j * angle) - np.exp(1j * true_angle)) < 1e-6
    if 0 < len(lost) < len(steps) and (right | np.isin(np.arange(len(steps)), lost)).all():
        cause = "rope_pair_lost" if len(lost) == 1 else "rope_partial_dims"
        yield Candidate(share(rotated, wrong, turned), cause, f"decode does not rotate the pairs {lost.tolist()}")
        return
    cosine, sine = np.cos(true_angle), np.sin(true_angle)
    for name, dtype in ROUNDED.items():
        table = cosine.astype(dtype).astype(np.float64) + 1j * sine.astype(dtype).astype(np.float64)
        rounded = _flat(before * table[None], dim, halves, wrong)
        yield Candidate(share(rotated, wrong, rounded), "rope_tables_rounded", f"decode rounds its tables to {name}")
    other = _flat(_pairs(plain, dim, not halves) * np.exp(1j * true_angle)[None], dim, not halves, wrong)
    layouts = ("halves", "neighbours") if halves else ("neighbours", "halves")
    yield Candidate(
        share(rotated, wrong, other), "rope_interleaved", f"decode pairs {layouts[1]} where prefill pairs {layouts[0]}"
    )
    if by_offset < 0.999:
        # The ratio of the angles says whether all turn slower alike, or the more the slower they are.
        ratio = np.divide(angle, true_angle, out=np.ones_like(angle), where=np.abs(true_angle) > 1e-9)
        slow = np.abs(true_angle) < 0.5
        alike = slow.sum() > 1 and np.ptp(ratio[slow]) < 1e-3 * abs(float(np.mean(ratio[slow])))
        cause = "rope_scaling" if alike else "rope_base"
        text = f"decode rotates its {what} by other angles than prefill: " + (
            f"all slower or faster by {float(np.mean(ratio[slow])):.4g}" if alike else "another base or table"
        )
        yield Candidate(share(rotated, wrong, turned) - 1e-6, cause, text)


def _name_offset(suspect: Suspect, what: str, offset: int) -> tuple[str, str]:
    """A rotation at another position, and the special ones: none at all, twice, of one of the two only."""
    position, site = suspect.address.position, suspect.address.site
    suffix = "_on_q" if site is Site.Q_ROPE else "_on_k"
    if offset == -position:
        return f"rope_missing{suffix}", f"decode does not rotate its {what}"
    if offset == position and site is Site.K_ROPE:
        return f"rope_twice{suffix}", f"decode rotates its {what} twice"
    keys = [values.at(Site.K_ROPE, position) for values in (suspect.prefill, suspect.decode)]
    alone = keys[0] is not None and keys[1] is not None and np.allclose(keys[0], keys[1], rtol=1e-9, atol=1e-12)
    cause = "rope_position_offset"
    cause += "_k" if site is Site.K_ROPE else ("_q" if alone else "")
    return cause, f"decode rotates its {what} as if at position {position + offset} instead of {position}"


def _head_dims(suspect: Suspect, size: int) -> list[int]:
    read = suspect.prefill.reads.get((Site.K_CACHE, suspect.address.position))
    return [read.rows.shape[2]] if read is not None and size % read.rows.shape[2] == 0 else []


def _unrotated(values: Values, site: Site, position: int) -> Floats | None:
    return next((v for before in _BEFORE[site] if (v := values.at(before, position)) is not None), None)


def _angle_per_position(suspect: Suspect, site: Site, dim: int, halves: bool) -> Floats | None:
    """The angle by which one position more turns each pair, from two neighbouring positions of prefill; None if prefill
    does not rotate pairs of this layout. Pairs that are not rotated have angle 0."""
    turned: dict[int, Floats] = {}
    for position in suspect.positions:
        plain, rotated = _unrotated(suspect.prefill, site, position), suspect.prefill.at(site, position)
        if plain is None or rotated is None:
            continue
        before, after = _pairs(plain, dim, halves), _pairs(rotated, dim, halves)
        if not np.allclose(np.abs(before), np.abs(after), rtol=1e-3, atol=1e-9):
            return None
        turned[position] = np.angle(np.sum(after * before.conj(), axis=0))
    steps = [np.angle(np.exp(1j * (turned[p + 1] - turned[p]))) for p in turned if p + 1 in turned]
    return np.asarray(steps[0]) if steps else None


def _pairs(values: Floats, dim: int, halves: bool) -> Complex:
    """[head, pair] complex numbers of the pairs that are rotated together."""
    heads = values.reshape(-1, dim)
    if halves:
        return np.asarray(heads[:, : dim // 2] + 1j * heads[:, dim // 2 :])
    return np.asarray(heads[:, 0::2] + 1j * heads[:, 1::2])


def _flat(pairs: Complex, dim: int, halves: bool, like: Floats) -> Floats:
    heads = np.empty((len(pairs), dim))
    if halves:
        heads[:, : dim // 2], heads[:, dim // 2 :] = pairs.real, pairs.imag
    else:
        heads[:, 0::2], heads[:, 1::2] = pairs.real, pairs.imag
    return heads.reshape(like.shape)
