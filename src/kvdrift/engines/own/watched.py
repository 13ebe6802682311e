"""What one watched call of a caller's own engine hands over, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvdrift.engines.base import NotPlanted, Sink
from kvdrift.engines.own.arrays import like, to_numpy
from kvdrift.errors import UsageError
from kvdrift.trace.model import Array, Slots
from kvdrift.vocabulary.facts import AttentionSpec, Plant
from kvdrift.vocabulary.sites import AFTER_LAYERS, ATTENTION_ROW_SITES, BEFORE_LAYERS, CACHE_SITES, STATE_SITES, Site

Key = tuple[int | None, Site]
_OUTSIDE = BEFORE_LAYERS | AFTER_LAYERS


@dataclass(slots=True)
class WatchedCall:
    """One call, while it runs.

    Attributes:
        start, q_len: tokens in the cache before it, and tokens that it feeds.
        probe: positions that are recorded.
        sink: where they go; None for a call of which nothing is recorded.
        replace: layer inputs [token, feature] that take the place of what the layer below computed.
        plant: a fault to commit.
        change: what is done to the input [token, ...] of the first layer; None for nothing.
        layers: those that are recorded; None for all.
        n_layers: of the model, None while it is not known.
        found: what was handed over, and its dtype.
    """

    start: int
    q_len: int
    probe: tuple[int, ...] = ()
    sink: Sink | None = None
    replace: Mapping[int, Array] = field(default_factory=dict)
    plant: Plant | None = None
    change: Callable[[Array], Array] | None = None
    layers: frozenset[int] | None = None
    n_layers: int | None = None
    found: dict[Key, str] = field(default_factory=dict)
    was_planted: bool = False
    attended: bool = False
    kv_len: int | None = None

    def see(self, layer: int | None, site: str, values: Any, slots: Sequence[int] | None) -> Any:
        """Record the values of a site, and return what the engine is to go on with; see `Engine.see`.

        Raises:
            UsageError: the site is unknown, or the shape is not the one that it has.
        """
        known = _site(layer, site)
        if (layer, known) in self.found:
            raise UsageError(f"{_place(layer, known)} was handed over twice in one call; an address is one value")
        array = to_numpy(values)
        self.found[layer, known] = array.dtype.name
        if known in CACHE_SITES:
            return self._rows(layer, known, values, array, slots)
        if known in STATE_SITES:
            return self._state(layer, known, values, array)
        tokens = self._by_token(layer, known, array)
        changed = self._changed(layer, known, tokens)
        self._record(layer, known, tokens if changed is None else changed, array.shape, slots)
        after = self._handed_on(layer, known)
        changed = changed if after is None else after.reshape(tokens.shape)
        return values if changed is None else _back(changed.reshape(array.shape), values)

    def attends(self, layer: int, spec: AttentionSpec) -> None:
        """Note how a layer attends."""
        self.attended = True
        if self.sink is not None and self.probe and self._is_recorded(layer, Site.ATTN_CTX):
            self.sink.add_attention(layer, spec)

    def finish(self) -> None:
        """Check that a fault that was to be committed was.

        Raises:
            NotPlanted: nothing was handed over where it belongs.
        """
        if self.plant is not None and self.plant.site is not Site.LOGITS and not self.was_planted:
            place = _place(self.plant.layer, self.plant.site)
            raise NotPlanted(f"nothing was handed over at {place}, so no positive control was planted")

    def _by_token(self, layer: int | None, site: Site, array: Array) -> Array:
        """The values [token, ...]; a batch axis of one row in front of the tokens is taken off."""
        if array.ndim >= 2 and array.shape[0] == self.q_len:
            return array
        if array.ndim >= 3 and array.shape[:2] == (1, self.q_len):
            return np.asarray(array[0])
        raise UsageError(
            f"{_place(layer, site)} has the shape {list(array.shape)} for {self.q_len} tokens; hand over [token, ...]"
        )

    def _changed(self, layer: int | None, site: Site, tokens: Array) -> Array | None:
        """The values with what kvdrift puts in their place; None if it is nothing."""
        found = None
        if site is Site.LAYER_IN and layer is not None and layer in self.replace:
            found = np.asarray(self.replace[layer]).astype(tokens.dtype).reshape(tokens.shape)
        if site is Site.LAYER_IN and layer == 0 and self.change is not None:
            found = self.change(tokens if found is None else found).astype(tokens.dtype)
        if self.plant is not None and (self.plant.layer, self.plant.site) == (layer, site):
            self.was_planted = True
            found = _scaled(tokens if found is None else found, self.plant.factor)
        return found

    def _handed_on(self, layer: int | None, site: Site) -> Array | None:
        """What the final norm is given in the place of what the last layer made."""
        last = self.n_layers is not None and layer == self.n_layers - 1
        return self.replace.get(self.n_layers or 0) if last and site is Site.LAYER_OUT else None

    def _record(
        self, layer: int | None, site: Site, tokens: Array, shape: tuple[int, ...], slots: Sequence[int] | None
    ) -> None:
        if self.sink is None:
            return
        inputs = self.sink.inputs
        if inputs is not None and layer is not None:
            if site is Site.LAYER_IN:
                inputs[layer] = tokens.reshape(self.q_len, -1).copy()
            elif site is Site.LAYER_OUT and self.n_layers is not None and layer == self.n_layers - 1:
                inputs[layer + 1] = tokens.reshape(self.q_len, -1).copy()
        if not self.probe or not self._is_recorded(layer, site):
            return
        rows = tokens[[position - self.start for position in self.probe]]
        if site not in ATTENTION_ROW_SITES:
            self.sink.add_rows(layer, site, self.probe, rows.reshape(len(rows), -1).copy())
            return
        if rows.ndim != 3:
            raise UsageError(f"{_place(layer, site)} has the shape {list(shape)}; hand over [token, head, slot]")
        where = self._slots(layer, site, rows.shape[2], slots)
        kept = (where >= 0) & (where < self.start + self.q_len)
        self.sink.add_rows(layer, site, self.probe, rows[:, :, kept].copy(), where[kept])

    def _rows(self, layer: int | None, site: Site, values: Any, array: Array, slots: Sequence[int] | None) -> Any:
        """Record the rows [slot, kv head, dim] that attention reads, and return what it is to read."""
        assert layer is not None
        rows = array[0] if array.ndim == 4 and len(array) == 1 else array
        if rows.ndim != 3:
            raise UsageError(f"{_place(layer, site)} has the shape {list(array.shape)}; hand over [slot, kv head, dim]")
        where = self._slots(layer, site, len(rows), slots)
        self.kv_len = len(rows) if self.kv_len is None else self.kv_len
        changed = self._planted_row(layer, site, rows, where)
        if self.sink is not None and self.probe and self._is_recorded(layer, site):
            kept = (where >= 0) & (where < self.start + self.q_len)
            found = rows if changed is None else changed
            self.sink.add_cache_read(layer, site, self.probe, where[kept], found[kept].copy())
        return values if changed is None else _back(changed.reshape(array.shape), values)

    def _state(self, layer: int | None, site: Site, values: Any, array: Array) -> Any:
        """Record a recurrent state, which exists only after the last token of a call."""
        last = self.start + self.q_len - 1
        if self.sink is not None and last in self.probe and self._is_recorded(layer, site):
            self.sink.add_rows(layer, site, (last,), array.reshape(1, -1).copy())
        return values

    def _planted_row(self, layer: int, site: Site, rows: Array, where: Slots) -> Array | None:
        plant = self.plant
        if plant is None or (plant.layer, plant.site) != (layer, site):
            return None
        places = np.flatnonzero(where == plant.slot) if plant.slot is not None else np.arange(len(rows))
        if not len(places):
            return None
        self.was_planted = True
        changed = rows.copy()
        changed[places] = _scaled(rows[places], plant.factor)
        return changed

    def _slots(self, layer: int | None, site: Site, n_slots: int, slots: Sequence[int] | None) -> Slots:
        length = self.start + self.q_len
        if slots is None:
            return np.arange(n_slots, dtype=np.int64) + max(0, length - n_slots) * (n_slots < length)
        found = np.asarray(slots, dtype=np.int64)
        if found.shape != (n_slots,):
            raise UsageError(f"{_place(layer, site)} has {n_slots} slots, and slots= names {found.size}")
        return found

    def _is_recorded(self, layer: int | None, site: Site) -> bool:
        return layer is None or self.layers is None or layer in self.layers or site in (Site.LAYER_IN, Site.LAYER_OUT)


def _site(layer: int | None, name: str) -> Site:
    try:
        site = Site(name)
    except ValueError as error:
        raise UsageError(f"see was given the site {name!r}, and the sites are {', '.join(Site)}") from error
    if site is Site.LOGITS:
        raise UsageError("see was given logits, which extend returns; leave that out")
    if (layer is None) != (site in _OUTSIDE):
        place = "outside the layers; give None as its layer" if site in _OUTSIDE else "in a layer; give its number"
        raise UsageError(f"see was given {site} with the layer {layer}, and that site is {place}")
    return site


def _place(layer: int | None, site: Site) -> str:
    return str(site) if layer is None else f"layer {layer} / {site}"


def _scaled(values: Array, factor: float) -> Array:
    return (values.astype(np.float64) * factor).astype(values.dtype)


def _back(array: Array, values: Any) -> Any:
    """The array as the framework of `values` has it; `values` themselves where that framework is not known."""
    found = like(array, values)
    return values if found is None else found


__all__ = ["Key", "WatchedCall"]
