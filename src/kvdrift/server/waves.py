"""Neighbours that change nothing: how many rows a server may compute at once and still repeat itself in every digit.

Kernels change with the number of rows in a batch, so that requests in flight together move each other's logprobs by
rounding. Where prefill was seen to repeat itself in every digit up to some number of rows, a few short prompts that
have fewer rows together must not move each other at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvdrift.server.estimates import STEPS
from kvdrift.server.rounding import DIGITS
from kvdrift.server.values import PREFILL_BATCHED, PREFILLS, LogprobPair

# Prefill with nothing else in flight. Single steps are not among them: where they alone differ, they may be at fault.
_ALONE = tuple(route for route in PREFILLS if route != PREFILL_BATCHED)


def quiet_below(pairs: Iterable[LogprobPair]) -> int:
    """Return the boundary of `STEPS` below which every prefill alone agrees with the first one in every digit, though
    not behind it; 0 if there is none, or if all agree. A NaN does not agree."""
    noisy = [pair.position for pair in pairs if pair.route in _ALONE and not pair.size <= DIGITS]
    return max((step for step in STEPS if noisy and step <= min(noisy)), default=0)


def most_rows(pairs: Sequence[LogprobPair]) -> int:
    """Return how many rows prefill was seen to compute with the same digits: the boundary below which it is quiet, or
    the last one that it reached."""
    reached = max((pair.position for pair in pairs if pair.route in _ALONE), default=0)
    quiet = quiet_below(pairs)
    is_noisy = any(pair.route in _ALONE and not pair.size <= DIGITS for pair in pairs)
    return quiet if is_noisy else max((step for step in STEPS if step <= reached), default=0)


def waves_of(lengths: Mapping[str, int], quiet: int, most: int) -> list[Sequence[str]]:
    """Return groups of prompts, by their `lengths`, to be in flight together: fewer than `quiet` rows in all.

    A prompt that is left alone has the shortest one beside it once more, if that fits; else it is in no group. A group
    has two to `most` prompts.

    >>> waves_of({"a": 57, "b": 45, "c": 18, "d": 4}, 64, 4)
    [('a', 'd'), ('b', 'c')]
    >>> waves_of({"a": 56, "b": 57, "c": 4}, 64, 4)
    [('b', 'c'), ('a', 'c')]
    """
    left = sorted(lengths, key=lambda name: lengths[name], reverse=True)
    found: list[Sequence[str]] = []
    while left:
        wave = [left.pop(0)]
        for name in list(left):
            if len(wave) < most and sum(lengths[one] for one in (*wave, name)) < quiet:
                wave.append(name)
                left.remove(name)
        if len(wave) == 1:
            shortest = min(lengths, key=lambda name: lengths[name])
            wave += [shortest] if lengths[wave[0]] + lengths[shortest] < quiet else []
        if 1 < len(wave) <= most:
            found.append(tuple(wave))
    return found
