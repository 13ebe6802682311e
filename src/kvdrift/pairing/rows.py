"""Pairs of a drift table as arrays, one a column, and the view of a single one.

A block holds the pairs of one comparison of two passes: one mode, one rung, one prompt. The layer column writes the
sites outside the layers as -1, and nothing else does: places and addresses that leave this module have layer None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import AlignmentError
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Objects = NDArray[np.object_]

_OUTSIDE = -1
SITES = tuple(Site)
_CODE = {site: code for code, site in enumerate(SITES)}

# A key holds, from the top: prompt, position, layer + 1, site.
_SITE_BITS, _LAYER_BITS, _POSITION_BITS = 5, 16, 26
_LIMITS = {"position": 1 << _POSITION_BITS, "layer": (1 << _LAYER_BITS) - 1}

# The columns of a block, and what their arrays hold.
COLUMNS: dict[str, type[np.generic]] = {
    "token_id": np.int64,
    "position": np.int64,
    "layer": np.int32,
    "site": np.int8,
    "dtype": np.object_,
    "n_elements": np.int64,
    "n_differ": np.int64,
    "equal": np.bool_,
    "max_abs": np.float64,
    "max_ulp": np.float64,
    "rel_l2": np.float64,
    "p99_abs": np.float64,
    "cosine": np.float64,
    "bias": np.float64,
    "gain": np.float64,
    "n_nonfinite": np.int64,
    "n_lost": np.int64,
    "worst_slot": np.int64,
    "n_bad_slots": np.int64,
    "n_bad_past": np.int64,
    "sha256_prefill": np.void,
    "sha256_decode": np.void,
}
HASHES = ("sha256_prefill", "sha256_decode")
DIGEST = np.dtype("V32")  # 32 bytes in place: as Python objects, hashes were a quarter of what a large table takes
NO_HASH = bytes(DIGEST.itemsize)


# What a choice of pairs takes from those that it was chosen from, once they have it.
_OF_PAIRS = frozenset({*COLUMNS, "prompt", "key"})
_FEW_BLOCKS = 64


class DriftRow(NamedTuple):
    """One pair; hashes are None away from the native dtype.

    `worst_slot` is the cached position whose row drifts most and `n_bad_slots` the rows whose bits differ, for cache
    reads only (-1 and 0 elsewhere); `n_bad_past` counts those of tokens before this one, which decode did
    not write. `n_lost` counts keys that one side has and the other lacks.
    """

    mode: str
    rung: str
    prompt: str
    token_id: int
    position: int
    layer: int | None
    site: Site
    dtype: str
    n_elements: int
    n_differ: int
    equal: bool
    max_abs: float
    max_ulp: float
    rel_l2: float
    p99_abs: float
    cosine: float
    bias: float
    gain: float
    n_nonfinite: int
    n_lost: int
    worst_slot: int
    n_bad_slots: int
    n_bad_past: int
    sha256_prefill: str | None
    sha256_decode: str | None

    @property
    def address(self) -> Address:
        return Address(self.prompt, self.position, self.layer, self.site)

    @property
    def place(self) -> Place:
        return Place(self.layer, self.site)


@dataclass(frozen=True, slots=True)
class Block:
    """The pairs of two passes. `columns` are those of `COLUMNS`, each an array [pair]; hashes are `DIGEST`, and
    `NO_HASH` where there is none. Whole numbers may be of a narrower type than theirs (`narrowed`)."""

    mode: str
    rung: str
    prompt: str
    columns: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["site"])


def layer_code(layer: int | None) -> int:
    """Return what the layer column holds of `layer`."""
    return _OUTSIDE if layer is None else layer


def layer_of(code: int) -> int | None:
    """Return the layer that the layer column writes as `code`."""
    return None if code == _OUTSIDE else code


def site_code(site: Site) -> int:
    """Return what the site column holds of `site`: its place in forward order."""
    return _CODE[site]


def block_of(rows: Sequence[DriftRow]) -> Block:
    """Return pairs of one mode, rung and prompt as a block."""
    values: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    values["layer"] = [layer_code(row.layer) for row in rows]
    values["site"] = [site_code(row.site) for row in rows]
    for side in HASHES:
        values[side] = [None if digest is None else bytes.fromhex(digest) for digest in values[side]]
    columns = {name: array_of(values[name], kind) for name, kind in COLUMNS.items()}
    return Block(rows[0].mode, rows[0].rung, rows[0].prompt, columns)


def empty_column(name: str, n_pairs: int) -> NDArray[Any]:
    """Return a column for so many pairs, not filled in."""
    kind: Any = DIGEST if COLUMNS[name] is np.void else COLUMNS[name]
    return np.empty(n_pairs, dtype=kind)


def narrowed(column: NDArray[Any]) -> NDArray[Any]:
    """Return a column in the least memory that holds it: whole numbers of fewer bytes, one object for all pairs.

    `Rows` widens them again, so that nothing is computed in a narrow type.
    """
    if len(column) == 0:
        return column
    if column.dtype == np.object_:
        same = bool((column == column[0]).all())
        return np.broadcast_to(np.array(column[0], dtype=object), column.shape) if same else column
    if column.dtype != np.int64:
        return column
    least, most = int(column.min()), int(column.max())
    kinds: tuple[type[np.signedinteger[Any]], ...] = (np.int8, np.int16, np.int32)
    return column.astype(next((kind for kind in kinds if _holds(kind, least, most)), np.int64), copy=False)


def _holds(kind: type[np.signedinteger[Any]], least: int, most: int) -> bool:
    limits = np.iinfo(kind)
    return bool(limits.min <= least and most <= limits.max)


def array_of(values: Sequence[Any] | NDArray[Any], kind: type[np.generic]) -> NDArray[Any]:
    """Return the values of a column as its array; of hashes, bytes or None for none."""
    if kind is np.void:
        digests = [NO_HASH if value is None else value for value in values]
        if any(len(digest) != DIGEST.itemsize for digest in digests):
            raise ValueError(f"a SHA-256 has {DIGEST.itemsize} bytes")
        return np.frombuffer(b"".join(digests), dtype=DIGEST)
    if kind is not np.object_:
        return np.array(values, dtype=kind)
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


class Rows:
    """Some pairs of a table, in its order. Each column is an array [pair], taken when it is first asked for.

    `prompt` holds codes of `prompts`, `layer` and `site` those of this module; `key` tells the addresses of one table
    apart, as one number each. `place` holds codes of `places`, which are in the order of their first pairs.
    """

    prompt: Ints
    token_id: Ints
    position: Ints
    layer: Ints
    site: Ints
    dtype: Objects
    n_elements: Ints
    n_differ: Ints
    equal: Bools
    max_abs: Floats
    max_ulp: Floats
    rel_l2: Floats
    p99_abs: Floats
    cosine: Floats
    bias: Floats
    gain: Floats
    n_nonfinite: Ints
    n_lost: Ints
    worst_slot: Ints
    n_bad_slots: Ints
    n_bad_past: Ints
    sha256_prefill: NDArray[np.void]
    sha256_decode: NDArray[np.void]
    key: Ints
    place: Ints
    rank: Ints
    places: list[Place]

    def __init__(
        self,
        blocks: Sequence[Block],
        prompts: Mapping[str, int],
        at: NDArray[np.intp] | None = None,
        whole: tuple[Rows, NDArray[np.intp]] | None = None,
    ) -> None:
        self._blocks = blocks
        self._at = at
        self._whole = whole  # those that these were chosen from, and which of them these are
        self.prompts = prompts
        self._sorted: tuple[NDArray[np.intp], Ints] | None = None
        self._by_places: dict[Place, NDArray[np.intp]] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) if self._at is None else len(self._at)

    def __getattr__(self, name: str) -> Any:
        value: Any
        if name.startswith("_"):
            raise AttributeError(name)  # a copy is asked for these before it has any attribute
        if self._whole is not None and name in _OF_PAIRS and name in self._whole[0].__dict__:
            value = self._whole[0].__dict__[name][self._whole[1]]
        elif name in COLUMNS:
            value = self._take(name)
        elif name == "prompt":
            value = self._of_blocks([self.prompts[block.prompt] for block in self._blocks])
        elif name == "key":
            value = keys_of(self.prompt, self.position, self.layer, self.site)
        elif name in ("place", "places"):
            self.place, self.places = _places(self.layer, self.site)
            return self.__dict__[name]
        elif name == "rank":
            ranks = {rank: i for i, rank in enumerate(sorted({place.forward_rank for place in self.places}))}
            value = np.array([ranks[place.forward_rank] for place in self.places], dtype=np.int64)[self.place]
        else:
            raise AttributeError(name)
        setattr(self, name, value)
        return value

    def _take(self, name: str) -> NDArray[Any]:
        parts = [block.columns[name] for block in self._blocks]
        if self._at is None or len(parts) == 1:
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else empty_column(name, 0)
            return _widened(name, whole if self._at is None else whole[self._at])
        if len(parts) > _FEW_BLOCKS and self._whole is not None:
            return np.asarray(getattr(self._whole[0], name)[self._whole[1]])
        # Few pairs out of many are not worth putting all of them together.
        found = empty_column(name, len(self._at))
        starts = self._starts
        number = np.searchsorted(starts, self._at, side="right") - 1
        for index in np.unique(number).tolist():
            chosen = number == index
            found[chosen] = parts[index][self._at[chosen] - starts[index]]
        return found

    @property
    def _starts(self) -> NDArray[np.intp]:
        """Which of all pairs the first one of each block is."""
        return np.cumsum([0, *map(len, self._blocks)][:-1])

    def _of_blocks(self, values: Sequence[int] | range) -> Ints:
        """A number of each block, for all its pairs."""
        whole = np.repeat(np.array(values, dtype=np.int64), [len(block) for block in self._blocks])
        return whole if self._at is None else whole[self._at]

    def where(self, chosen: NDArray[Any]) -> Rows:
        """Return the pairs that a mask or an array of indices chooses."""
        at = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
        return Rows(self._blocks, self.prompts, at if self._at is None else self._at[at], (self, at))

    @property
    def names(self) -> list[str]:
        """The prompts by their codes."""
        return list(self.prompts)

    def of_prompt(self, prompt: str) -> Bools:
        """Whether each pair is one of `prompt`."""
        return np.asarray(self.prompt == self.prompts.get(prompt, -1))

    def is_at(self, *sites: Site) -> Bools:
        """Whether each pair is one of `sites`."""
        wanted = [site_code(site) for site in sites]
        return np.asarray(self.site == wanted[0]) if len(wanted) == 1 else np.isin(self.site, wanted)

    @property
    def is_outside(self) -> Bools:
        """Whether each pair is one of a site outside the layers."""
        return np.asarray(self.layer == _OUTSIDE)

    @property
    def by_places(self) -> Mapping[Place, NDArray[np.intp]]:
        """Which pairs each place has, in the order of `places`."""
        if self._by_places is None:
            order = np.argsort(self.place, kind="stable")
            ends = np.cumsum(np.bincount(self.place, minlength=len(self.places)))
            self._by_places = dict(zip(self.places, np.split(order, ends[:-1]), strict=False))
        return self._by_places

    def groups(self) -> Iterator[tuple[Place, Rows]]:
        """Yield the pairs of each place, in the order of `places`."""
        for place, at in self.by_places.items():
            yield place, self.where(at)

    def largest_by_place(self, values: Floats) -> dict[Place, float]:
        """Return the largest of `values` [pair] at each place; NaN counts as none."""
        found = np.full(len(self.places), -np.inf)
        np.fmax.at(found, self.place, values)
        return dict(zip(self.places, found.tolist(), strict=True))

    def by_place(self, values: Mapping[Place, float]) -> Floats:
        """Return for each pair what `values` holds of its place, NaN where it holds nothing."""
        return np.array([values.get(place, np.nan) for place in self.places], dtype=np.float64)[self.place]

    def find(self, keys: Ints) -> NDArray[np.intp]:
        """Return which pair has each of `keys`, -1 where none has."""
        if len(self) == 0:
            return np.full(len(keys), -1, dtype=np.intp)
        if self._sorted is None:
            order = np.argsort(self.key, kind="stable")
            self._sorted = order, self.key[order]
        order, known = self._sorted
        found = np.searchsorted(known, keys)
        found[found == len(known)] = 0
        return np.where(known[found] == keys, order[found], -1)

    def index(self, address: Address) -> int | None:
        """Return which pair is the one of `address`, None if there is none."""
        if address.prompt not in self.prompts:
            return None
        found = int(self.find(keys_at([address], self.prompts))[0])
        return None if found < 0 else found

    def addresses(self, chosen: NDArray[Any] | None = None) -> list[Address]:
        """Return the addresses of the pairs that a mask or an array of indices chooses, by default of all."""
        if chosen is not None:
            return self.where(chosen).addresses()
        names = self.names
        columns = (self.prompt.tolist(), self.position.tolist(), self.place.tolist())
        return [Address(names[p], position, *self.places[place]) for p, position, place in zip(*columns, strict=True)]

    def row(self, index: int) -> DriftRow:
        """Return one pair."""
        at, starts = index if self._at is None else int(self._at[index]), self._starts
        number = int(np.searchsorted(starts, at, side="right")) - 1
        block, at = self._blocks[number], at - int(starts[number])
        return _drift_row(block, [block.columns[name][at : at + 1].tolist()[0] for name in COLUMNS])

    def __iter__(self) -> Iterator[DriftRow]:
        columns = [getattr(self, name).tolist() for name in COLUMNS]
        blocks = [self._blocks[number] for number in self._of_blocks(range(len(self._blocks))).tolist()]
        for block, *row in zip(blocks, *columns, strict=True):
            yield _drift_row(block, row)


def _widened(name: str, column: NDArray[Any]) -> NDArray[Any]:
    """The column in the type that `COLUMNS` names."""
    return column.astype(np.int64, copy=False) if COLUMNS[name] is np.int64 else column


def _drift_row(block: Block, row: Sequence[Any]) -> DriftRow:
    """The pair of a block whose columns hold `row`."""
    values = dict(zip(COLUMNS, row, strict=True))
    for side in HASHES:
        values[side] = None if values[side] == NO_HASH else values[side].hex()
    values |= {"layer": layer_of(values["layer"]), "site": SITES[values["site"]]}
    return DriftRow(block.mode, block.rung, block.prompt, **values)


def keys_of(prompt: Ints, position: Ints, layer: Ints, site: Ints | int) -> Ints:
    """Return the key of each address from the codes of its parts."""
    unit = (prompt << _POSITION_BITS) | position
    return (((unit << _LAYER_BITS) | (layer.astype(np.int64) + 1)) << _SITE_BITS) | site


def keys_at(addresses: Sequence[Address], prompts: Mapping[str, int]) -> Ints:
    """Return the keys of addresses, whose prompts have the codes `prompts`.

    Raises:
        AlignmentError: a position or a layer number is too large.
    """
    for name, limit in _LIMITS.items():
        if above := next((a for a in addresses if (getattr(a, name) or 0) >= limit), None):
            raise _too_large(above.prompt, name, limit)
    parts = [(prompts[a.prompt], a.position, layer_code(a.layer), site_code(a.site)) for a in addresses]
    return keys_of(*np.array(parts, dtype=np.int64).reshape(-1, 4).T)


def beside(keys: Ints, site: Site) -> Ints:
    """Return the keys of `site` at the same prompts, positions and layers."""
    return (keys >> _SITE_BITS << _SITE_BITS) | site_code(site)


def elsewhere(keys: Ints, layer: int | None, site: Site) -> Ints:
    """Return the keys of another place at the same prompts and positions."""
    bits = _LAYER_BITS + _SITE_BITS
    return (keys >> bits << bits) | ((layer_code(layer) + 1) << _SITE_BITS) | site_code(site)


def layer_keys(keys: Ints) -> Ints:
    """Return one number for each prompt, position and layer."""
    return keys >> _SITE_BITS


def unit_keys(keys: Ints) -> Ints:
    """Return one number for each prompt and position."""
    return keys >> (_SITE_BITS + _LAYER_BITS)


def check_range(block: Block) -> None:
    """Make sure that keys can tell the addresses of a block apart.

    Raises:
        AlignmentError: a position or a layer number is too large.
    """
    for name, limit in _LIMITS.items():
        if len(block) and int(block.columns[name].max()) >= limit:
            raise _too_large(block.prompt, name, limit)


def _too_large(prompt: str, name: str, limit: int) -> AlignmentError:
    return AlignmentError(f"{prompt}: a {name} is above {limit - 1}, and no trace reaches that far")


def is_in_range(address: Address) -> bool:
    """Return whether a compared pair can have this address: its position and layer are not too large for a key."""
    return all((getattr(address, name) or 0) < limit for name, limit in _LIMITS.items())


def _places(layer: Ints, site: Ints) -> tuple[Ints, list[Place]]:
    """Dense codes of the (layer, site) of each pair, and the places in the order of their first pairs."""
    joined = ((layer.astype(np.int64) + 1) << _SITE_BITS) | site
    first = np.full(int(joined.max(initial=-1)) + 1, -1, dtype=np.int64)
    first[joined[::-1]] = np.arange(len(joined) - 1, -1, -1)
    known = np.flatnonzero(first >= 0)
    known = known[np.argsort(first[known])]
    codes = np.empty_like(first)
    codes[known] = np.arange(len(known))
    places = [
        Place(layer_of((code >> _SITE_BITS) - 1), SITES[code & ((1 << _SITE_BITS) - 1)]) for code in known.tolist()
    ]
    return codes[joined], places
