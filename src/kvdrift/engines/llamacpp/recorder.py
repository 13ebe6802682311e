"""The callback of the graph scheduler: reads the wanted nodes of one call, writes layer inputs, plants faults."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdrift.engines.base import NotPlanted
from kvdrift.engines.llamacpp.calls import Fault, Fed, Probe
from kvdrift.engines.llamacpp.cells import Cells
from kvdrift.engines.llamacpp.ggml import Ggml, Tensor
from kvdrift.engines.llamacpp.graph import (
    Floats,
    Indices,
    Role,
    alibi_slopes,
    attention_spec,
    cache_layer,
    head_rows,
    is_latent,
    is_table,
    role_of,
    rows_by_head,
    scores_again,
    softmax,
    token_rows,
    transposed_rows,
)
from kvdrift.engines.llamacpp.lent import LentRow
from kvdrift.engines.llamacpp.windows import see_window
from kvdrift.errors import CaptureError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.sites import CACHE_SITES, Site, forward_rank

_ALWAYS = frozenset({Site.LAYER_IN, Site.LAYER_OUT})  # layer isolation needs all of them
_SEED = 20261  # any fixed number does


@dataclass(frozen=True, slots=True)
class _AttentionRows:
    slots: Indices
    values: Array


@dataclass(frozen=True, slots=True)
class _Met:
    """The cells that attention can meet: their logical positions, their numbers, and the mask's rows [row, cell]."""

    slots: Indices
    cells: Indices
    bias: Floats


_Place = tuple[int, int | None, Site]  # index of the probe, layer, site
NodeKey = tuple[str, str]  # name and operation
_NO_NODE: NodeKey = ("", "")
_WRITABLE = frozenset({"site", "values", "flash"})  # roles of nodes whose value is that of their site


class GraphRecorder:
    """Reads the graphs of one context. `cells` says which token each cell of the cache holds, and `queries` which node
    holds the queries that attention reads, by layer, as far as attention was met."""

    def __init__(
        self,
        ggml: Ggml,
        *,
        n_layers: int,
        n_cells: int,
        layers: frozenset[int] | None,
        fault: Fault | None,
        shift: float = 0.0,
        queries: dict[int, NodeKey] | None = None,
        cells: Cells,
    ) -> None:
        self._ggml = ggml
        self._n_layers = n_layers
        self._foreign = n_cells  # a cell of another sequence gets a slot beyond every position
        self._layers = layers
        self._fault = fault
        self._shift = shift  # what enters the first layer is multiplied by 1 + shift * xi
        self._was_shifted = False
        self._queries = {} if queries is None else queries
        self._latent: set[int] = set()  # layers whose values are met in the cache of the keys
        self.cells = cells
        self._lent = LentRow()
        self._call: Fed | None = None
        self._error: BaseException | None = None
        self._rows: dict[_Place, Array] = {}
        self._attention_rows: dict[_Place, _AttentionRows] = {}
        self._specs: dict[tuple[int, int], AttentionSpec] = {}
        self._raw: dict[tuple[int, int], Array] = {}  # scores of a probe before the mask, [row, head, cell]
        self._softcap: dict[int, float] = {}
        self.has_table = False  # whether an activation was met that ggml looks up in a float16 table
        self.has_rotation = False  # whether a query was met that is rotated by its position

    def arm(self, call: Fed) -> None:
        """Record the next call."""
        self._call, self._error, self._was_shifted = call, None, False
        for kept in (self._rows, self._attention_rows, self._specs, self._raw, self._softcap):
            kept.clear()

    def finish(self) -> None:
        """Hand the recorded values to their sinks, in forward order, and raise what went wrong in the callback."""
        call, self._call = self._call, None
        if self._error is not None:
            raise self._error
        assert call is not None
        if call.plant is not None and not call.was_planted:
            raise NotPlanted(
                f"no node of layer {call.plant.layer} / {call.plant.site} was met, so no positive control was planted"
            )
        places = sorted({*self._rows, *self._attention_rows}, key=lambda place: forward_rank(place[1], place[2]))
        for place in places:
            index, layer, site = place
            probe = call.probes[index]
            if site in CACHE_SITES:
                read = self._attention_rows[place]
                assert layer is not None
                probe.sink.add_cache_read(layer, site, probe.positions, read.slots, read.values)
            elif place in self._attention_rows:
                seen = self._attention_rows[place]
                probe.sink.add_rows(layer, site, probe.positions, seen.values, seen.slots)
            else:
                probe.sink.add_rows(layer, site, probe.positions, self._rows[place])
        for (index, layer), spec in self._specs.items():
            call.probes[index].sink.add_attention(layer, spec)

    def __call__(self, address: int, ask: bool, _user: object) -> bool:
        """The callback: `ask` asks whether the node is wanted, before it is computed; then it is handed over."""
        call = self._call
        if call is None or self._error is not None:
            return False
        try:
            node = self._ggml.tensor(address)
            if ask:
                if self._fault is not None:
                    self._fault.before(node, call)
                self._plant_in_cache(node, call)
                if self.cells.has_window:
                    see_window(self.cells, node, call.members)
                wanted = self._is_wanted(node, call)
                return wanted or (self._fault is not None and self._fault.watches(call))
            self._take(node, call)
        except BaseException as error:  # noqa: BLE001  # nothing may unwind through C; `finish` raises it
            self._error = error
            return False
        return True

    def _is_wanted(self, node: Tensor, call: Fed) -> bool:
        if not call.is_observed and self._fault is None and not self._shift:
            return node.op == "SET_ROWS"  # where tokens are stored must be known of every call
        self.has_table = self.has_table or is_table(node)
        role = role_of(node)
        if self._is_query(node, role, call):
            return True
        if role is None:
            return False
        self.has_rotation = self.has_rotation or role.kind == "rotated_query"
        if not call.is_read and self._fault is None:  # layer inputs alone, so that the graph runs in large pieces
            return role.kind in ("first_input", "store_keys") or role.site is Site.LAYER_OUT
        return role.layer is None or role.site in _ALWAYS or self._is_recorded(role.layer) or role.kind == "store_keys"

    def _is_recorded(self, layer: int) -> bool:
        return self._layers is None or layer in self._layers

    def _take(self, node: Tensor, call: Fed) -> None:
        role = role_of(node)
        if self._fault is not None:
            self._fault.after(node, role, call)
        if not self._is_wanted(node, call):
            return
        self._plant(node, role, call)
        if role is None:
            return
        match role.kind:
            case "first_input":
                self._take_first_input(node, role, call)
            case "store_keys":
                self._take_stored(node, role, call)
            case "scores":
                self._take_scores(node, role, call)
            case "softmax":
                self._take_softmax(node, role, call)
            case "values":
                self._take_values(node, role, call)
            case "flash":
                self._take_flash(node, role, call)
            case "site":
                self._take_site(node, role, call)
        self._lent.put_back(node)

    def _plant_in_cache(self, node: Tensor, call: Fed) -> None:
        """Scale one cached row for the operation that is about to read it."""
        if call.plant is None or call.plant.slot is None or call.was_planted or not call.probes:
            return
        call.was_planted = self._lent.lend(node, call.plant, self.cells, call.probes[0].sequence)

    def _plant(self, node: Tensor, role: Role | None, call: Fed) -> None:
        plant = call.plant
        if plant is None or call.was_planted:
            return  # once: a product with a bias is met before its sum, and hands on what was planted
        is_site = role is not None and role.kind in _WRITABLE and (role.layer, role.site) == (plant.layer, plant.site)
        if is_site or self._is_query(node, role, call):
            node.write(node.values().astype(np.float32) * np.float32(plant.factor))
            call.was_planted = True

    def _is_query(self, node: Tensor, role: Role | None, call: Fed) -> bool:
        """Whether the positive control is to be planted in queries, and these are they: what attention reads of the
        layer, since a norm behind the rotation would take the fault away again; the rotated ones if that is unknown."""
        plant = call.plant
        if plant is None or plant.site is not Site.Q_ROPE or plant.layer is None:
            return False
        known = self._queries.get(plant.layer)
        if known is not None:
            return (node.name, node.op) == known
        return role is not None and role.kind == "rotated_query" and role.layer == plant.layer

    def _take_first_input(self, node: Tensor, role: Role, call: Fed) -> None:
        if role.site is not None:
            self._put(node, None, role.site, call)
        self._replace(node, 0, call)
        self._shift_input(node, call)
        self._put(node, 0, Site.LAYER_IN, call)
        self._keep(node, 0, call)

    def _take_site(self, node: Tensor, role: Role, call: Fed) -> None:
        assert role.site is not None
        if role.site is Site.ATTN_CTX and role.layer in self._latent:
            return
        self._put(node, role.layer, role.site, call)
        if role.site is Site.LAYER_OUT and role.layer is not None:
            self._keep(node, role.layer + 1, call)
            self._replace(node, role.layer + 1, call)
            if role.layer + 1 < self._n_layers:
                self._put(node, role.layer + 1, Site.LAYER_IN, call)

    def _take_stored(self, node: Tensor, role: Role, call: Fed) -> None:
        """New keys were written: note the cells, and record the keys as they went in."""
        assert role.layer is not None
        keys, cells = node.source(0), node.source(1)
        assert keys is not None
        assert cells is not None
        index = cells.values().ravel()
        if len(index) != len(call.members):
            raise CaptureError(f"layer {role.layer} stored {len(index)} keys for {len(call.members)} fed tokens")
        self.cells.store(role.layer, index.tolist(), call.members, node.shape[2])
        if call.is_observed and self._is_recorded(role.layer):
            self._put(keys, role.layer, Site.K_ROPE, call)

    def _take_scores(self, node: Tensor, role: Role, call: Fed) -> None:
        """Scores before softmax; without a softcap this is the product of queries and keys itself."""
        assert role.layer is not None
        name = node.name.rpartition("-")[0]
        if name == "kq":
            queries, keys = node.source(1), node.source(0)
            assert queries is not None
            assert keys is not None
            for index, probe in enumerate(call.probes):
                self._put_queries(index, probe, role.layer, queries)
                self._put_cache(index, probe, role.layer, Site.K_CACHE, keys)
        elif name == "kq_scaled_2" or (name == "kq_scaled" and role.layer in self._softcap):
            self._softcap[role.layer] = node.parameter(0)
        elif name == "kq_tanh":
            self._softcap.setdefault(role.layer, -1.0)  # until the scale behind it says how much
        for index, probe in enumerate(call.probes):
            self._raw[index, role.layer] = rows_by_head(node, probe.rows)

    def _take_softmax(self, node: Tensor, role: Role, call: Fed) -> None:
        assert role.layer is not None
        scale, max_bias, softcap = node.parameter(0), node.parameter(1), self._softcap.get(role.layer)
        if softcap is not None and scale != 1.0:
            softcap = -1.0  # capped before it was scaled, which replay does not know
        mask = node.source(1)
        for index, probe in enumerate(call.probes):
            raw = self._raw.get((index, role.layer))
            if raw is None:
                continue
            met = self._met(role.layer, probe, mask)
            scores = raw[..., met.cells].astype(np.float32) * np.float32(scale)
            probs = rows_by_head(node, probe.rows)[..., met.cells]
            self._put_attention(index, probe, role.layer, call, met, scores, probs)
            self._note(index, probe, role.layer, scale, max_bias, softcap, node.source(2))
        call.kernels.add("MUL_MAT, SOFT_MAX, MUL_MAT")

    def _take_values(self, node: Tensor, role: Role, call: Fed) -> None:
        assert role.layer is not None
        values = node.source(0)
        assert values is not None
        self._take_context(node, role.layer, values, call)
        for index, probe in enumerate(call.probes):
            slots, cells = self._cells_of(role.layer, probe)
            self._attention_rows[index, role.layer, Site.V_CACHE] = _AttentionRows(
                slots, transposed_rows(values, cells)
            )

    def _take_flash(self, node: Tensor, role: Role, call: Fed) -> None:
        """One operation for all of attention: its operands are read, and its scores computed again from them."""
        assert role.layer is not None
        queries, keys, values, mask = (node.source(i) for i in range(4))
        assert queries is not None
        assert keys is not None
        assert values is not None
        scale, max_bias, cap = node.parameter(0), node.parameter(1), node.parameter(2)
        softcap = cap if cap != 0.0 else None
        for index, probe in enumerate(call.probes):
            self._put_queries(index, probe, role.layer, queries)
            self._put_cache(index, probe, role.layer, Site.K_CACHE, keys)
            slots, cells = self._cells_of(role.layer, probe)
            self._attention_rows[index, role.layer, Site.V_CACHE] = _AttentionRows(slots, head_rows(values, cells))
            met = self._met(role.layer, probe, mask)
            scores = scores_again(rows_by_head(queries, probe.rows), head_rows(keys, met.cells), scale, softcap)
            bias = met.bias[:, np.newaxis]
            slopes = alibi_slopes(max_bias, scores.shape[1])
            probs = softmax(scores + (bias if slopes is None else slopes[:, np.newaxis] * bias), node.source(4))
            self._put_attention(index, probe, role.layer, call, met, scores, probs)
            self._note(index, probe, role.layer, scale, max_bias, softcap, node.source(4))
        self._take_context(node, role.layer, values, call)
        call.kernels.add("FLASH_ATTN_EXT")

    def _take_context(self, node: Tensor, layer: int, values: Tensor, call: Fed) -> None:
        """Record what attention gives. A node that bears its name takes its place, but for latent values."""
        if is_latent(values):
            self._latent.add(layer)
        for index, probe in enumerate(call.probes):
            rows = rows_by_head(node, probe.rows)
            self._rows[index, layer, Site.ATTN_CTX] = rows.reshape(len(rows), -1)

    def _put_queries(self, index: int, probe: Probe, layer: int, queries: Tensor) -> None:
        rows = rows_by_head(queries, probe.rows)
        self._rows[index, layer, Site.Q_ROPE] = rows.reshape(len(rows), -1)
        source = queries.view_source or queries
        role = role_of(source)
        is_own = role is None or role.kind != "site"  # what is another site as well cannot be planted in alone
        can_plant = is_own and source.n_elements == queries.n_elements and source.is_dense
        self._queries[layer] = (source.name, source.op) if can_plant else _NO_NODE

    def _put_cache(self, index: int, probe: Probe, layer: int, site: Site, node: Tensor) -> None:
        slots, cells = self._cells_of(layer, probe)
        self._attention_rows[index, layer, site] = _AttentionRows(slots, head_rows(node, cells))
        # The values of a layer without keys of its own are those of the layer whose cache it reads.
        owner = cache_layer(node)
        if owner is not None and owner != layer:
            self.cells.alias(layer, owner)

    def _cells_of(self, layer: int, probe: Probe) -> tuple[Indices, Indices]:
        """Return the positions of a probe's sequence that are in the cache, in order, and their cells."""
        return self.cells.of(layer, probe.sequence)

    def _met(self, layer: int, probe: Probe, mask: Tensor | None) -> _Met:
        """Return the cells that attention can meet: the sequence's own, and others that the mask leaves visible.

        Those others get slots beyond every position, so that they have no partner in a pass that does not see them.
        """
        slots, cells = self._cells_of(layer, probe)
        if mask is None:
            return _Met(slots, cells, np.zeros((len(probe.rows), len(cells))))
        bias = mask.values()[0, 0][probe.rows].astype(np.float64)
        foreign = np.setdiff1d(np.flatnonzero(~np.isneginf(bias).all(axis=0)), cells)
        cells = np.concatenate([cells, foreign])
        return _Met(np.concatenate([slots, self._foreign + foreign]), cells, bias[:, cells])

    def _put_attention(
        self, index: int, probe: Probe, layer: int, call: Fed, met: _Met, scores: Array, probs: Array
    ) -> None:
        """Record scores and probabilities [row, head, cell]."""
        scores = np.where(np.isneginf(met.bias)[:, np.newaxis], -np.inf, scores).astype(np.float32)
        call.kv_len = call.kv_len if call.kv_len is not None else len(met.cells)
        self._attention_rows[index, layer, Site.ATTN_SCORES] = _AttentionRows(met.slots, scores)
        self._attention_rows[index, layer, Site.ATTN_PROBS] = _AttentionRows(met.slots, probs.astype(np.float32))

    def _note(
        self,
        index: int,
        probe: Probe,
        layer: int,
        scale: float,
        max_bias: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        record = self._attention_rows[index, layer, Site.ATTN_SCORES]
        visible = ~np.isneginf(record.values[-1]).all(axis=0)
        seen = [int(slot) for slot in record.slots[visible]]
        slopes = alibi_slopes(max_bias, record.values.shape[1])
        spec = attention_spec(scale, slopes, softcap, sinks, seen, probe.positions[-1])
        if spec is not None:
            self._specs[index, layer] = spec

    def _put(self, node: Tensor, layer: int | None, site: Site, call: Fed) -> None:
        if layer is not None and site not in _ALWAYS and not self._is_recorded(layer):
            return
        outputs = list(call.outputs)
        for index, probe in enumerate(call.probes):
            chosen = np.array([outputs.index(int(row)) for row in probe.rows], dtype=np.int64)
            rows = token_rows(node, len(call.members), len(outputs), probe.rows, chosen)
            if rows is not None:
                self._rows[index, layer, site] = rows

    def _replace(self, node: Tensor, key: int, call: Fed) -> None:
        value = call.replace.get(key)
        if value is None:
            return
        rows = np.asarray(value)
        if len(rows) == len(call.members) and node.shape[2] == len(call.outputs):
            rows = rows[list(call.outputs)]
        if node.n_elements != rows.size:
            raise CaptureError(f"{node.name} holds {node.n_elements} elements, and {rows.size} were to replace them")
        if rows.size:
            node.write(rows)

    def _shift_input(self, node: Tensor, call: Fed) -> None:
        """Multiply what enters the first layer, once: an embedding may be scaled or added to afterwards."""
        if not self._shift or self._was_shifted:
            return
        self._was_shifted = True
        first = call.members[0][1]
        xi = np.random.default_rng((_SEED, first, len(call.members))).standard_normal(node.n_elements)
        node.write(node.values().astype(np.float64).ravel() * (1.0 + self._shift * xi))

    def _keep(self, node: Tensor, key: int, call: Fed) -> None:
        """Keep the layer inputs of all fed tokens, if somebody wants them."""
        if call.inputs is None:
            return
        values, outputs = node.values()[0, 0], list(call.outputs)
        if len(values) == len(call.members):
            call.inputs[key] = values.copy()
        elif len(values) == len(outputs):
            call.inputs[key] = np.full((len(call.members), values.shape[1]), np.nan, dtype=values.dtype)
            call.inputs[key][outputs] = values
