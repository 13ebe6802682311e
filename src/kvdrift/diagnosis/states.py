"""Explanations of a recurrent state after a step: columns of a convolution window in another order, a state that stands
still.

What a step leaves of a window is told by the pass itself: all columns but the newest are those of its own window one
step before, each moved by one place.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.model import EXACT, Candidate, Suspect, share
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# Widths of convolutions that are tried; a window is recorded without its shape.
_WIDTHS = (2, 3, 4, 5, 6, 8)
# A column of fewer channels is found by chance.
_FEWEST_CHANNELS = 8


def explain_window(suspect: Suspect) -> Iterator[Candidate]:
    """Yield in which order decode has the columns of its window, if that is not how a window moves on."""
    site, position = suspect.address.site, suspect.address.position
    right, wrong, before = (
        values.at(site, at)
        for values, at in ((suspect.prefill, position), (suspect.decode, position), (suspect.decode, position - 1))
    )
    if site is not Site.CONV_STATE or right is None or wrong is None or before is None:
        return
    if not right.size == wrong.size == before.size or not np.isfinite([right.ravel(), wrong.ravel()]).all():
        return
    for width in (width for width in _WIDTHS if right.size % width == 0 and right.size // width >= _FEWEST_CHANNELS):
        prefill, decode, old = (values.reshape(-1, width) for values in (right, wrong, before))
        # The newest column comes from this step, and is held against prefill's.
        known = np.concatenate([old, prefill[:, -1:]], axis=1)
        nearest = ((decode[:, :, None] - known[:, None, :]) ** 2).sum(axis=0).argmin(axis=1)
        if np.array_equal(nearest, np.arange(1, width + 1)):
            continue
        words = ", ".join("the new one" if n == width else str(n) for n in nearest)
        text = f"decode's window holds, of the columns that it had before this step, those in the order {words}"
        predicted = known[:, nearest].reshape(right.shape)
        yield Candidate(share(right, wrong, predicted), Cause.CONV_STATE_ORDER, text, EXACT)


def explain_standing_state(suspect: Suspect) -> Candidate | None:
    """Return which state of decode has the same bits after the failing step as before it, None if none has.

    A prefill of all tokens shows its state behind the last one alone, so that the output fails where states cannot be
    compared. That a step left no trace in a state is told by decode itself. No share is claimed.
    """
    position = suspect.address.position
    for site, cause in ((Site.CONV_STATE, Cause.CONV_STATE_STALE), (Site.SSM_STATE, Cause.SSM_STATE_STALE)):
        before, after = (suspect.decode.at(site, at) for at in (position - 1, position))
        if before is None or after is None or not np.array_equal(before, after) or not after.any():
            continue
        text = (
            f"decode has the same {site}, bit for bit, after the steps at positions {position - 1} and {position}: a "
            "step does not advance it"
        )
        return Candidate(0.0, cause, text)
    return None
