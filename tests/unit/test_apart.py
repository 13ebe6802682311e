"""Angles by which decode turns its pairs further than prefill, told without what was rotated."""

from dataclasses import replace

import numpy as np
import pytest

from kvdrift.diagnosis.apart import explain_turned_apart
from kvdrift.diagnosis.model import Floats, Suspect, Values
from kvdrift.trace.model import CacheRead
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import Site

_POSITIONS, _HEADS, _DIM, _TURNED = (6, 7, 8), 3, 12, 8
_STEP = 100.0 ** (-np.arange(_TURNED // 2) / (_TURNED // 2))


def turned(heads: Floats, angles: Floats, halves: bool = True) -> Floats:
    """Heads whose last elements, halves or neighbours paired, are turned by angles [pair]."""
    half = _TURNED // 2
    tail = np.arange(_DIM - _TURNED, _DIM)
    left, right = (tail[:half], tail[half:]) if halves else (tail[0::2], tail[1::2])
    first, second = heads[:, left], heads[:, right]
    cos, sin = np.cos(angles), np.sin(angles)
    found = heads.copy()
    found[:, left], found[:, right] = first * cos - second * sin, first * sin + second * cos
    return found


def suspected(
    angles: dict[int, Floats], site: Site = Site.Q_ROPE, n_heads: int = _HEADS, halves: bool = True
) -> Suspect:
    """Both passes, of which decode is turned by so much more at each position; the keys that are read agree."""
    rng = np.random.default_rng(0)
    rows = {at: turned(rng.standard_normal((n_heads, _DIM)), at * _STEP, halves) for at in _POSITIONS}
    reads = {
        (Site.K_CACHE, at): CacheRead(0, Site.K_CACHE, (at,), np.arange(at + 1), np.ones((at + 1, 1, _DIM)))
        for at in _POSITIONS
    }
    prefill = Values({(site, at): row.ravel() for at, row in rows.items()}, {}, reads)
    decode = Values({(site, at): turned(row, angles[at], halves).ravel() for at, row in rows.items()}, {}, reads)
    return Suspect(Address("p", 6, 0, site), "float64", _POSITIONS, prefill, decode, None)


def told(suspect: Suspect) -> tuple[str, str]:
    """The cause that explains most, and its words."""
    best = max(explain_turned_apart(suspect, 2.0**-53), default=None)
    return ("", "") if best is None else (str(best.cause), best.text)


@pytest.mark.parametrize(
    ("angles", "cause", "words"),
    [
        (dict.fromkeys(_POSITIONS, _STEP), "rope_position_offset_q", "1 further on"),
        (dict.fromkeys(_POSITIONS, -3.0 * _STEP), "rope_position_offset_q", "3 further back"),
        ({at: -at * _STEP for at in _POSITIONS}, "rope_missing_on_q", "not at all"),
        ({at: (6 - at) * _STEP for at in _POSITIONS}, "rope_position_offset_q", "stood still at 6"),
        ({at: (40 - at) * _STEP for at in _POSITIONS}, "rope_position_offset_q", "stood still at 40"),
        ({at: 0.01 * at * _STEP for at in _POSITIONS}, "rope_angles", "in proportion to the position"),
        ({at: 0.3 * at**2 * _STEP for at in _POSITIONS}, "rope_angles", "by other angles than prefill"),
    ],
    ids=["offset", "back", "missing", "frozen", "frozen ahead", "table", "no rule"],
)
@pytest.mark.parametrize("halves", [True, False])
def test_how_angles_grow_says_what_is_wrong(angles: dict[int, Floats], cause: str, words: str, halves: bool) -> None:
    found = told(suspected(angles, halves=halves))

    assert found[0] == cause
    assert f"the last {_TURNED} elements" in found[1]
    assert words in found[1]


def test_keys_that_are_off_as_well_are_said_to_be_at_another_position() -> None:
    suspect = suspected(dict.fromkeys(_POSITIONS, _STEP))
    reads = {key: replace(read, rows=np.full_like(read.rows, 2.0)) for key, read in suspect.decode.reads.items()}

    assert told(replace(suspect, decode=replace(suspect.decode, reads=reads)))[0] == "rope_position_offset"


def test_what_is_no_rotation_is_not_explained() -> None:
    suspect = suspected(dict.fromkeys(_POSITIONS, _STEP))
    rng = np.random.default_rng(1)
    stretched = {key: row * (1.0 + rng.random(row.size)) for key, row in suspect.prefill.sites.items()}

    assert told(replace(suspect, decode=replace(suspect.decode, sites=stretched))) == ("", "")


def test_one_head_without_a_rule_is_no_evidence() -> None:
    angles = {at: 0.3 * at**2 * _STEP for at in _POSITIONS}

    assert told(suspected(angles, n_heads=1)) == ("", "")
    assert told(suspected(dict.fromkeys(_POSITIONS, _STEP), n_heads=1))[0] == "rope_position_offset_q"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_explain_nothing(value: float) -> None:
    suspect = suspected(dict.fromkeys(_POSITIONS, _STEP))
    suspect.decode.sites[Site.Q_ROPE, 7][3] = value

    assert told(suspect) == ("", "")
