"""Explanations of cached rows that were altered: elements in another order or basis, cut off, merged, added up, read in
pages of another layout, stored in codes of groups, or as codes whose sign is lost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, LEAST_ENOUGH, Candidate, Floats, Indices, share
from kvdrift.diagnosis.orders import orders_of
from kvdrift.diagnosis.storage import at_rung
from kvdrift.trace.model import Slots
from kvdrift.vocabulary.causes import Cause

# A matrix of a basis is believed where it is fitted to so many times more values than it has.
_OVER = 1.25
# Elements that are cut off and others that are not, of both so many at least.
_FEWEST = 2
# A code that is nearer to a whole number is one.
_BETWEEN = 1e-9
_PAGES = (2, 4, 8, 16, 32, 64, 128)
_GROUPS = (2, 4, 8, 16, 32, 64, 128)
_BITS = {
    2: Cause.KV_ROUNDED_INT2,
    3: Cause.KV_ROUNDED_INT3,
    4: Cause.KV_ROUNDED_INT4,
    8: Cause.KV_ROUNDED_INT8,
}


def explain_alterations(
    name: str, slots: Slots, rows: Floats, read: Floats, bad: Indices, rung: str
) -> Iterator[Candidate]:
    """Yield what may have been done to the rows that are bad.

    Args:
        name: "key" or "value", for the text.
        slots: logical positions [slot].
        rows: what prefill reads [slot, head, dim].
        read: what decode reads, of the same shape, finite in the bad rows.
        bad: indices of the slots that differ.
        rung: the rung of the pair, at which codes are computed.
    """
    right, wrong = rows[bad], read[bad]
    if not wrong.any():
        return
    found = chain(
        _reordered(name, right, wrong),
        _clipped(name, right, wrong),
        _other_basis(name, right, wrong),
        _merged(name, slots[bad], right, wrong),
        _added(name, slots, rows, read, bad),
        _pages(name, rows, read, bad),
        _in_groups(name, rows, wrong, bad, rung),
        _unsigned(name, right, wrong),
    )
    # Of so many forms one always removes a part of a difference: that is no near explanation.
    yield from (item for item in found if item.explained >= LEAST_ENOUGH)


def _reordered(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    n_rows, heads, dim = right.shape
    for words, order in orders_of(heads * dim, heads):
        if (order.reshape(heads, dim) % dim == np.arange(dim)).all():
            continue  # whole heads in another order have a cause of their own
        predicted = right.reshape(n_rows, -1)[:, order].reshape(right.shape)
        text = f"{n_rows} {name} rows have their elements in another order: {words}"
        yield Candidate(share(right, wrong, predicted), Cause.DIMS_PERMUTED, text, EXACT)


def _clipped(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """No element is larger than the largest of decode, which several have."""
    limit = float(np.abs(wrong).max())
    at_limit = np.abs(wrong) == limit
    if int(at_limit.sum()) >= _FEWEST and int((~at_limit).sum()) >= _FEWEST and float(np.abs(right).max()) > limit:
        text = f"{len(right)} {name} rows are cut off at {limit:.6g}, of {float(np.abs(right).max()):.6g}"
        yield Candidate(share(right, wrong, np.clip(right, -limit, limit)), Cause.KV_CLIPPED, text, EXACT)


def _other_basis(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """All heads of all rows are multiplied by one orthogonal matrix: that of Hadamard, or one that is fitted
    (Schoenemann 1966), where there are more values than it has."""
    dim = right.shape[2]
    flat, turned = right.reshape(-1, dim), wrong.reshape(-1, dim)
    if dim & (dim - 1) == 0 and dim > 2:
        matrix = _hadamard(dim)
        text = f"{len(right)} {name} rows are those of prefill times a Hadamard matrix"
        yield Candidate(share(flat, turned, flat @ matrix), Cause.KEYS_IN_OTHER_BASIS, text, EXACT)
    if len(flat) >= _OVER * dim and dim > 1:
        left, _, under = np.linalg.svd(flat.T @ turned)
        order = np.abs(left @ under).argmax(axis=0)
        if len(set(order.tolist())) == dim:
            text = f"{len(right)} {name} rows have the elements of their heads in the order {order.tolist()}"
            yield Candidate(share(flat, turned, flat[:, order]), Cause.DIMS_PERMUTED, text, EXACT)
        text = f"{len(right)} {name} rows are those of prefill under one orthogonal matrix, the same for all of them"
        # A rotation by other positions is such a matrix too, and says more.
        yield Candidate(share(flat, turned, flat @ (left @ under)), Cause.KEYS_IN_OTHER_BASIS, text, GENERAL)


def _hadamard(size: int) -> Floats:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size))


def _merged(name: str, slots: Slots, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """Rows that are bad hold the mean of all of them."""
    if len(right) > 1:
        predicted = np.broadcast_to(right.mean(axis=0, keepdims=True), right.shape)
        text = f"the slots {slots.tolist()[:6]} all hold the mean of their {name} rows"
        yield Candidate(share(right, wrong, predicted), Cause.SLOTS_MERGED, text, EXACT)


def _added(name: str, slots: Slots, rows: Floats, read: Floats, bad: Indices) -> Iterator[Candidate]:
    """Each bad row is the right one and that of another slot together; the distance is the same for all of them.

    Beside a row that is much larger than the right one their sum is nearly that row alone, which says more.
    """
    for shift in range(1, len(rows)):
        for source in (bad - shift, bad + shift):
            if ((source < 0) | (source >= len(rows))).any():
                continue
            explained = share(rows[bad], read[bad], rows[bad] + rows[source])
            if explained <= share(rows[bad], read[bad], rows[source]):
                continue
            of, added = slots[bad].tolist()[:4], slots[source].tolist()[:4]
            text = f"the slots {of} hold their own {name} rows and those of the slots {added} added up"
            yield Candidate(explained, Cause.ROWS_ADDED, text, EXACT)


def _pages(name: str, rows: Floats, read: Floats, bad: Indices) -> Iterator[Candidate]:
    """Heads and slots are exchanged in each page, [slot, head, dim] read as [head, slot, dim] or the other way round;
    the last page may not be full, and is then as it should be."""
    n_slots, heads, dim = rows.shape
    cause = Cause.K_TRANSPOSED if name == "key" else Cause.V_TRANSPOSED
    for size in (size for size in _PAGES if heads > 1 and size <= n_slots):
        whole = n_slots // size * size
        pages = rows[:whole].reshape(-1, size, heads, dim)
        for moved in (
            pages.reshape(-1, heads, size, dim).transpose(0, 2, 1, 3),
            pages.transpose(0, 2, 1, 3).reshape(-1, size, heads, dim),
        ):
            predicted = rows.copy()
            predicted[:whole] = moved.reshape(whole, heads, dim)
            text = f"{name} rows are read with heads and slots exchanged in each page of {size} slots"
            yield Candidate(share(rows[bad], read[bad], predicted[bad]), cause, text, EXACT)


def _in_groups(name: str, rows: Floats, wrong: Floats, bad: Indices, rung: str) -> Iterator[Candidate]:
    """Rounded, or cut towards the least of their group, to codes between the least and the largest of a group (Liu et
    al. 2024, KIVI: keys by channel in groups of tokens, values by token in groups of elements)."""
    n_slots, heads, dim = rows.shape
    groups: list[tuple[str, int, int]] = [("each head of a row", 1, dim), ("each channel", n_slots, 1)]
    groups += [(f"each channel of {size} tokens", size, 1) for size in _GROUPS if size <= n_slots]
    groups += [(f"{size} elements of a row", 1, size) for size in _GROUPS if size < dim and dim % size == 0]
    for words, tokens, elements in groups:
        whole = n_slots // tokens * tokens
        blocks = rows[:whole].reshape(whole // tokens, tokens, heads, dim // elements, elements)
        least, most = (edge(axis=(1, 4), keepdims=True) for edge in (blocks.min, blocks.max))
        inside = bad < whole
        for bits, cause in _BITS.items():
            step = at_rung(rung, at_rung(rung, most - least) / (2**bits - 1))
            lifted = at_rung(rung, blocks - least)
            codes = at_rung(rung, np.divide(lifted, step, out=np.zeros_like(blocks), where=step > 0.0))
            for how, whole_codes in (
                ("rounded", (np.round(codes),)),
                # The largest of a group stands between two codes: rounding decides which.
                ("cut", (np.floor(codes + _BETWEEN), np.floor(codes - _BETWEEN))),
            ):
                forms = np.repeat(rows[None], len(whole_codes), axis=0)
                for form, kept in zip(forms, whole_codes, strict=True):
                    form[:whole] = at_rung(rung, at_rung(rung, kept * step) + least).reshape(whole, heads, dim)
                gaps = np.abs(forms[:, bad] - wrong[None])
                predicted = np.take_along_axis(forms[:, bad], gaps.argmin(axis=0)[None], axis=0)[0]
                predicted[~inside] = rows[bad][~inside]
                text = (
                    f"{len(bad)} {name} rows are {how} to codes of {bits} bits between the least and the largest value "
                    f"of {words}"
                )
                yield Candidate(share(rows[bad], wrong, predicted), cause, text, EXACT)


def _unsigned(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """Codes below zero are read as unsigned ones: 2^bits steps are added, with one scale for each head or row."""
    for bits in (4, 8):
        for axes in ((2,), (1, 2)):
            step = np.abs(right).max(axis=axes, keepdims=True) / (2 ** (bits - 1) - 1)
            codes = np.round(np.divide(right, step, out=np.zeros_like(right), where=step > 0.0))
            predicted = np.where(codes < 0.0, codes + 2.0**bits, codes) * step
            text = f"{len(right)} {name} rows are signed codes of {bits} bits that are read as unsigned ones"
            yield Candidate(share(right, wrong, predicted), Cause.KV_CODES_UNSIGNED, text, EXACT)
