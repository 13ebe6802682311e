"""Orders in which elements may stand where a layout was mistaken: halves for neighbours, rows for columns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.model import Indices


def orders_of(size: int, heads: int = 1) -> Iterator[tuple[str, Indices]]:
    """Yield words and the index of the element that stands in each place, for vectors of `size` elements.

    `heads` is by how many heads the vector is divided, where that is known.
    """
    plain = np.arange(size)
    if size % 2 == 0 and size > 2:
        yield "its halves put together as neighbours", plain.reshape(2, -1).T.ravel()
        yield "its neighbours taken apart into halves", plain.reshape(-1, 2).T.ravel()
        yield "its halves exchanged", np.roll(plain, size // 2)
        yield "its neighbours exchanged", plain.reshape(-1, 2)[:, ::-1].ravel()
    if size > 1:
        yield "backwards", plain[::-1]
        yield "moved by one", np.roll(plain, 1)
        yield "moved by one", np.roll(plain, -1)
    if heads > 1 and size % heads == 0 and size > heads:
        yield "heads and elements exchanged", plain.reshape(heads, -1).T.ravel()
        yield "heads and elements exchanged", plain.reshape(-1, heads).T.ravel()
        within = plain.reshape(heads, -1)
        for words, order in orders_of(size // heads):
            yield f"in each head {words}", within[:, order].ravel()
