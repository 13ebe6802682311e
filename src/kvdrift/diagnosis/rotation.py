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
    name = "query" if site is Site.Q_ROPE else "key"
    yield Candidate(share(rotated, wrong, plain), "rope_missing", f"decode does not rotate its {name}")


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
    if offset:
        yield Candidate(
            share(rotated, wrong, predicted),
            "rope_position_offset",
            f"decode rotates its {what} as if at position {position + offset} instead of {position}",
        )
    turned = _flat(before * np.exp(1j * angle)[None], dim, halves, wrong)
    lost = np.flatnonzero((np.abs(angle) < 1e-9) & (np.abs(np.angle(np.exp(1j * steps * position))) > 1e-6))
    kept = np.abs(np.exp(1j * angle) - np.exp(1j * np.angle(np.sum(reference * before.conj(), axis=0)))) < 1e-6
    if 0 < len(lost) < len(steps) and (kept | np.isin(np.arange(len(steps)), lost)).all():
        yield Candidate(
            share(rotated, wrong, turned), "rope_pair_lost", f"decode does not rotate the pairs {lost.tolist()}"
        )
    elif not offset or share(rotated, wrong, predicted) < 0.99:
        yield Candidate(
            share(rotated, wrong, turned) - 1e-6,
            "rope_frequencies",
            f"decode rotates its {what} by other angles than prefill: another base, scaling or table",
        )


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
