"""Which positions of two passes are compared: a value that one of them should have and lacks is counted, not passed."""

from __future__ import annotations

from collections.abc import Iterable

from kvdrift.vocabulary.facts import Call


def compared_positions(prefill: Iterable[int], decode: Iterable[int], calls: Iterable[Call]) -> list[int]:
    """Return the positions at which a decode pass is compared, ascending.

    Those that it recorded; and those that prefill recorded and that decode must have computed too: by a call that fed
    one token to a cache, or between two positions that decode recorded.

    Args:
        prefill: positions that prefill recorded.
        decode: positions that decode recorded.
        calls: those of the decode pass.
    """
    recorded = set(decode)
    steps = {call.start for call in calls if call.q_len == 1 and call.cache_len_before > 0}
    low, high = min(recorded, default=0), max(recorded, default=-1)
    return sorted(recorded | {position for position in prefill if position in steps or low <= position <= high})
