"""Contexts of llama.cpp and the token sequences inside them: feed, rewind, clear, and several in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvdrift.engines.base import Sink
from kvdrift.engines.llamacpp.calls import Fault, Fed, Probe
from kvdrift.engines.llamacpp.cells import Cells, Member
from kvdrift.engines.llamacpp.library import Library
from kvdrift.engines.llamacpp.recorder import GraphRecorder, NodeKey
from kvdrift.errors import CaptureError, UsageError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import Call, Plant
from kvdrift.vocabulary.sites import Site

_PADDING = 256  # cells are reserved in steps of this size


def cells_of(n_tokens: int) -> int:
    """Return how many cells llama.cpp reserves for some tokens."""
    return -(-n_tokens // _PADDING) * _PADDING


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """How a context computes: types of K and V in the cache, kernels, and how many tokens go through at once.

    `is_unified` says that all sequences share one stream of cells, and `is_ring` that layers with a sliding window have
    cells for their window alone, whose oldest are written again.
    """

    kv_type: int
    kv_name: str
    flash: bool
    threads: int
    n_batch: int
    is_unified: bool = True
    is_ring: bool = False

    @property
    def attention(self) -> str:
        return "flash" if self.flash else "no flash"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSize:
    """How many sequences a context holds, `n_spare` of them for branches, and how many tokens each at most."""

    max_length: int
    n_sequences: int
    n_spare: int = 0

    @property
    def n_all(self) -> int:
        """How many sequences there may be at once."""
        return self.n_sequences + self.n_spare

    def n_cells(self, *, is_unified: bool) -> int:
        """How many cells the cache has in all; a stream of its own for each sequence is filled up by itself."""
        return cells_of(self.max_length * self.n_all) if is_unified else self.n_all * cells_of(self.max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextWatch:
    """What is read of the calls of a context, and what is changed in them.

    `layers` are recorded of the model's `n_layers`, None for all; `fault` interferes with every call, and `shift` moves
    the inputs of layers. Without `watched` the scheduler gets no callback, and no more than logits is read. `queries`
    is what contexts of one model have learnt of it; see `GraphRecorder`.
    """

    n_layers: int
    layers: frozenset[int] | None = None
    fault: Fault | None = None
    watched: bool = True
    shift: float = 0.0
    queries: dict[int, NodeKey] = field(default_factory=dict)


def _parameters(api: Any, options: ContextOptions, n_cells: int, n_sequences: int) -> Any:
    """Return the parameters of a context of `n_cells` cells in all."""
    parameters = api.llama_context_default_params()
    parameters.n_ctx = n_cells
    parameters.n_batch = parameters.n_ubatch = options.n_batch
    parameters.n_seq_max = n_sequences
    parameters.n_threads = parameters.n_threads_batch = options.threads
    parameters.type_k = parameters.type_v = options.kv_type
    parameters.flash_attn_type = int(options.flash)
    parameters.offload_kqv = parameters.op_offload = False
    parameters.swa_full = not options.is_ring  # a window that overwrites its oldest rows cannot be rewound
    parameters.kv_unified = options.is_unified  # one stream of cells, which one mask parts into sequences
    parameters.no_perf = True
    return parameters


class Context:
    """One llama_context with the cache of its sequences; `on_close` is told when it was freed."""

    def __init__(
        self,
        library: Library,
        model: Any,
        options: ContextOptions,
        size: ContextSize,
        watch: ContextWatch,
        *,
        on_close: Callable[[Context], None],
    ) -> None:
        api = library.api
        n_all, n_cells = size.n_all, size.n_cells(is_unified=options.is_unified)
        self._library, self._api, self.options = library, api, options
        self._on_close, self._fault, self._watched = on_close, watch.fault, watch.watched
        self.recorder = GraphRecorder(
            library.ggml,
            n_layers=watch.n_layers,
            n_cells=n_cells,
            layers=watch.layers,
            fault=watch.fault,
            shift=watch.shift,
            queries=watch.queries,
            cells=Cells(
                options.is_unified, 1 if options.is_unified else n_all, has_window=bool(api.llama_model_n_swa(model))
            ),
        )
        parameters = _parameters(api, options, n_cells, n_all)
        if watch.watched:
            self._callback = api.ggml_backend_sched_eval_callback(self.recorder)  # kept: C still calls it
            parameters.cb_eval = self._callback
        library.complaint()
        self.pointer = api.llama_init_from_model(model, parameters)
        if not self.pointer:
            raise CaptureError(
                f"llama.cpp cannot open a context of {n_cells} tokens with a {options.kv_name} cache, "
                f"{options.attention}: {library.complaint()}"
            )
        self._memory = api.llama_get_memory(self.pointer)
        self._n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
        if not self._memory:
            self.close()
            raise CaptureError("the model keeps no cache, so it has no decode step to audit")
        self._batch = api.llama_batch_init(options.n_batch, 0, 1)
        self.n_cells = n_cells
        self.sequences = [LlamaSequence(self, number) for number in range(size.n_sequences)]
        self._open = set(range(size.n_sequences))
        self._spare = list(range(size.n_sequences, n_all))

    @property
    def api(self) -> Any:
        """The binding of llama.cpp."""
        return self._api

    def complain_anew(self) -> None:
        """Forget what llama.cpp complained of so far."""
        self._library.complaint()

    def complaint(self) -> str:
        """Return what llama.cpp complained of first since then."""
        return self._library.complaint()

    def changes_of_state(self, state: bytes) -> bytes:
        """Return the bytes that are read back of a saved state: the same, if no fault is planted."""
        return state if self._fault is None else self._fault.loading(state)

    def leave(self, sequence: int) -> None:
        """Take note that a sequence is no longer used; the last one frees the context."""
        self._open.discard(sequence)
        if not self._open:
            self.close()

    def close(self) -> None:
        """Free the context."""
        if self.pointer:
            if getattr(self, "_batch", None) is not None:
                self._api.llama_batch_free(self._batch)
            self._api.llama_free(self.pointer)
            self.pointer = None
            self._on_close(self)

    def remove(self, sequence: int, first: int, stop: int | None = None) -> bool:
        """Drop the tokens of a sequence from position `first` to `stop` - 1, or to its end; False if it cannot."""
        if not self._api.llama_memory_seq_rm(self._memory, sequence, first, -1 if stop is None else stop):
            return False
        self.recorder.cells.drop(sequence, first, stop)
        return True

    def close_gap(self, sequence: int, first: int, by: int) -> None:
        """Move the tokens of a sequence from position `first` on down by `by`, as a context shift does."""
        self.shift(sequence, first, -1, -by)
        self.recorder.cells.move(sequence, first, -by)

    def branch(self, source: int) -> LlamaSequence:
        """Return a new sequence with the cells of another one, by llama.cpp's own copy (llama_memory_seq_cp).

        Raises:
            UsageError: the context was opened for no more sequences.
        """
        if not self._spare:
            raise UsageError("this context was opened for no further sequence")
        target = self._spare.pop(0)
        self._open.add(target)
        taken = source if self._fault is None else self._fault.copying(source)
        self._api.llama_memory_seq_cp(self._memory, taken, target, -1, -1)
        self.recorder.cells.share(source, target)
        return LlamaSequence(self, target)

    @property
    def can_shift(self) -> bool:
        """Whether tokens can be moved to other positions."""
        return bool(self._api.llama_memory_can_shift(self._memory))

    def shift(self, sequence: int, first: int, end: int, by: int) -> None:
        """Move the positions `first` to `end` - 1 of a sequence, as a server does that drops old tokens.

        llama.cpp rotates the cached keys to their new positions with the next call.
        """
        self._api.llama_memory_seq_add(self._memory, sequence, first, end, by)

    def feed(self, tokens: Sequence[int], fed: Fed) -> list[int]:
        """Run one call of llama_decode on at most n_batch tokens; return the most likely token behind each output."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        wanted = frozenset(fed.outputs)
        for row, (token, (sequence, position)) in enumerate(zip(tokens, fed.members, strict=True)):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = row in wanted
        self._library.complaint()
        if self._fault is not None:
            self._fault.starting(self, fed)
        if self._watched:
            self.recorder.arm(fed)
        code = self._api.llama_decode(self.pointer, batch)
        if self._watched:
            self.recorder.finish()
        if code != 0:
            raise CaptureError(
                f"llama_decode of {len(tokens)} tokens at position {fed.members[0][1]} returned {code}: "
                f"{self._library.complaint()}"
            )
        if not self._watched:
            for probe in fed.probes:
                rows = np.stack([self._logits(int(row)) for row in probe.rows])
                probe.sink.add_rows(None, Site.LOGITS, probe.positions, rows)
        return [int(np.argmax(self._logits(row))) for row in fed.outputs]

    def _logits(self, row: int) -> Array:
        """The logits [token] behind one row of the last call, in llama.cpp's own memory."""
        logits = self._api.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), shape=(self._n_vocab,))


class LlamaSequence:
    """A token sequence and its rows in the cache of a context."""

    def __init__(self, context: Context, number: int) -> None:
        self.context = context
        self.number = number
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def extend(
        self,
        tokens: Sequence[int],
        *,
        probe: Sequence[int] = (),
        sink: Sink | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> int:
        """Feed tokens; see `EngineSequence.extend`. More than n_batch of them go through in several calls."""
        return extend_together([Feed(self, tokens, probe, sink)], replace=replace, plant=plant)[0]

    def drop(self, first: int, n_tokens: int) -> None:
        """Drop tokens from position `first` on, and move those behind them to their places (context shift)."""
        if not 0 <= first <= first + n_tokens <= self._length:
            raise UsageError(f"cannot drop {n_tokens} tokens from position {first} of {self._length}")
        if not self.context.remove(self.number, first, first + n_tokens):
            raise CaptureError(f"this cache cannot drop {n_tokens} tokens from position {first} (llama_memory_seq_rm)")
        self.context.close_gap(self.number, first + n_tokens, n_tokens)
        self._length -= n_tokens

    def branch(self) -> LlamaSequence:
        """Return another sequence of the same context that holds the same tokens."""
        other = self.context.branch(self.number)
        other.advance(self._length)
        return other

    def rewind(self, n_tokens: int) -> None:
        """Drop the last positions from the cache."""
        if not 0 <= n_tokens <= self._length:
            raise UsageError(f"cannot drop {n_tokens} of {self._length} tokens")
        if n_tokens and not self.context.remove(self.number, self._length - n_tokens):
            raise CaptureError(f"this cache cannot drop its last {n_tokens} tokens (llama_memory_seq_rm)")
        self._length -= n_tokens

    def advance(self, n_tokens: int) -> None:
        """Note that tokens were fed."""
        self._length += n_tokens

    def close(self) -> None:
        self.context.leave(self.number)


@dataclass(frozen=True, slots=True)
class Feed:
    """What one sequence gets in a call that it may share with others of its context."""

    sequence: LlamaSequence
    tokens: Sequence[int]
    probe: Sequence[int] = ()
    sink: Sink | None = None


def extend_together(
    feeds: Sequence[Feed], *, replace: Mapping[int, Array] | None = None, plant: Plant | None = None
) -> list[int]:
    """Feed several sequences of one context in the same call and return the most likely next token of each.

    Raises:
        UsageError: the sequences are of different contexts, a probe is not among the fed positions, or `replace` is
            given for several sequences, or for other tokens than those fed.
        CaptureError: llama.cpp failed, or a value could not be read.
    """
    context = feeds[0].sequence.context
    if any(feed.sequence.context is not context for feed in feeds):
        raise UsageError("sequences that are fed together must come from one new_batch")
    tokens: list[int] = []
    members: list[Member] = []
    for feed in feeds:
        start = feed.sequence.length
        if any(not start <= position < start + len(feed.tokens) for position in feed.probe):
            raise UsageError(
                f"probe {list(feed.probe)} is not inside the fed positions {start}..{start + len(feed.tokens) - 1}"
            )
        tokens += feed.tokens
        members += [(feed.sequence.number, start + i) for i in range(len(feed.tokens))]
    if replace and (len(feeds) != 1 or any(len(value) != len(tokens) for value in replace.values())):
        raise UsageError("layer inputs can be replaced for all the tokens that are fed to one sequence")
    kept = feeds[0].sink.inputs if len(feeds) == 1 and feeds[0].sink is not None else None
    ends = [(feed.sequence.number, feed.sequence.length + len(feed.tokens) - 1) for feed in feeds]
    last = {member: index for index, member in enumerate(ends)}
    following = [0] * len(feeds)
    seen: list[Fed] = []
    step = context.options.n_batch
    for first in range(0, len(tokens), step):
        part = members[first : first + step]
        replaced = {key: value[first : first + step] for key, value in (replace or {}).items()}
        fed = _fed(feeds, part, last, replaced, plant)
        fed.inputs = None if kept is None else {}
        for row, token in zip(fed.outputs, context.feed(tokens[first : first + step], fed), strict=True):
            if part[row] in last:
                following[last[part[row]]] = token
        seen.append(fed)
    if kept is not None:
        parts = [fed.inputs or {} for fed in seen]
        kept.update({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    for feed in feeds:
        if feed.sink is not None:
            feed.sink.calls.extend(_calls(context.options, feed, seen))
        feed.sequence.advance(len(feed.tokens))
    return following


def _fed(
    feeds: Sequence[Feed],
    members: Sequence[Member],
    last: Mapping[Member, int],
    replace: Mapping[int, Array],
    plant: Plant | None,
) -> Fed:
    """Return the call that feeds `members`: which rows are probed, and whose logits are needed."""
    rows = {member: row for row, member in enumerate(members)}
    probes = []
    for feed in feeds:
        number = feed.sequence.number
        positions = tuple(position for position in feed.probe if (number, position) in rows)
        if feed.sink is not None and positions:
            index = np.array([rows[number, position] for position in positions], dtype=np.int64)
            probes.append(Probe(number, positions, index, feed.sink))
    wanted = {int(row) for probe in probes for row in probe.rows}
    wanted |= {row for member, row in rows.items() if member in last}
    return Fed(members, sorted(wanted), probes, replace, plant)


def _calls(options: ContextOptions, feed: Feed, seen: Sequence[Fed]) -> list[Call]:
    """Path proof of one feed. A prompt that went through in several batches is one prefill, unless they are of one
    token each, which is how a decode step is fed."""
    start, n_tokens = feed.sequence.length, len(feed.tokens)
    kernels = {kernel for fed in seen for kernel in fed.kernels}
    kv_lens = [fed.kv_len for fed in seen if fed.kv_len is not None]
    facts = (f"K and V {options.kv_name}", f"n_batch {options.n_batch}", *sorted(kernels))
    if options.n_batch > 1 or n_tokens == 1:
        kv_len = max(kv_lens, default=None)
        return [Call(start, n_tokens, start, kv_len, options.attention, facts)]
    return [Call(start + i, 1, start + i, None, options.attention, facts) for i in range(n_tokens)]
