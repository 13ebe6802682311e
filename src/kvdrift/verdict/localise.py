"""Where a mismatch begins: the earliest address in forward order that stands above its noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvdrift.instruments.ladder import Excess
from kvdrift.vocabulary.address import Address


def first_beyond(excess: Excess, prompts: Sequence[str]) -> Address | None:
    """Return the first address with an excess above 1: by layer and site, then by prompt, then by position.

    Layer and site come first because nothing in a causal model flows from a layer to one below it, at any position.
    """
    order = {name: rank for rank, name in enumerate(prompts)}
    rows = excess.rows.where(excess.beyond)
    by_code = np.array([order.get(name, 0) for name in rows.names], dtype=np.int64)
    first = np.lexsort((rows.position, by_code[rows.prompt], rows.rank))[:1]
    return next(iter(rows.addresses(first)), None)
