"""A GGUF file in llama.cpp as an engine: its own graphs and its own cache, watched through the scheduler's callback."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kvdrift.engines.base import Ability, RouteFacts, Shifts, require_layers
from kvdrift.engines.llamacpp.calls import Fault
from kvdrift.engines.llamacpp.library import Library, Model, check_gguf, kv_types, load_library, requantise
from kvdrift.engines.llamacpp.recorder import GraphRecorder, NodeKey
from kvdrift.engines.llamacpp.routes import LlamaRoutes
from kvdrift.engines.llamacpp.sequence import (
    Context,
    ContextOptions,
    ContextSize,
    ContextWatch,
    LlamaSequence,
    cells_of,
)
from kvdrift.engines.llamacpp.state import EXPORTS
from kvdrift.errors import CaptureError, EngineUnavailable, NotApplicable, UsageError
from kvdrift.trace.model import Array, Trace
from kvdrift.vocabulary.facts import EngineFacts, sites_by_layer
from kvdrift.vocabulary.precision import Roundoffs, Rungs
from kvdrift.vocabulary.sites import Site

LADDER = Rungs("float16", "float32")
_TABLE = 2.0**-11  # unit roundoff of a table in float16
_CLEAN = {"float16": "f16", "float32": "f32"}  # type of weights and cache in the two clean configurations
# Tokens fed to find the sites: more than one, so that the token axis is seen.
_SURVEY_TOKENS = 3
DEFAULT_BATCH = 512  # llama.cpp's own n_ubatch
RING_BATCH = 32

# Unit roundoff of what a matrix product rounds its activations to before it multiplies, by type of the weights; every
# block format has its activations packed into 8-bit blocks (ggml-cpu: vec_dot_type).
# With float32 weights nothing is rounded before, and sums of some thousand terms in another order remain.
_PRODUCT = {"f32": 2.0**-19, "f16": 2.0**-11, "bf16": 2.0**-8}
_BLOCKS = 2.0**-8
# Of one stored row of K or V: half a step of the largest element of a block.
_STORED = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 2.0**-8, "q5_0": 2.0**-5, "q5_1": 2.0**-5}
_FOUR_BITS = 2.0**-4
_HADAMARD = 64  # heads of packed keys are multiplied by matrices of this width
# Flash attention sums probabilities times values in float16 where V is float16: one rounding a key.
_FLASH = 2.0**-9


@dataclass(frozen=True, slots=True)
class _NoDraws:
    """llama.cpp draws no random numbers in llama_decode."""

    draws: bool = False


class LlamaCppEngine(Shifts):
    """One GGUF file; use as a context manager.

    Args:
        path: the file.
        kv_type: type of K and V in the cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl.
        flash: whether attention runs as one fused operation.
        threads: threads of llama.cpp; None for all cores.
        n_batch: how many tokens go through the graph at once, both n_batch and n_ubatch of llama.cpp.
        layers: layers to record, None for all.
        fault: a bug to plant into every call, for tests of the audit itself.
        folder: where the file is written again for the clean configurations, and found by the next engine on the same
            file; None for a temporary folder that goes when the engine is closed.

    Raises:
        EngineUnavailable: llama-cpp-python or the file is not to be had, or the file is not a decoder.
        UsageError: the options do not fit together.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kv_type: str = "f16",
        flash: bool = False,
        threads: int | None = None,
        n_batch: int = DEFAULT_BATCH,
        layers: Sequence[int] | None = None,
        fault: Fault | None = None,
        folder: Path | None = None,
    ) -> None:
        self._path = Path(path)
        check_gguf(self._path)
        if n_batch < 1 or (threads is not None and threads < 1):
            raise UsageError(f"n_batch is {n_batch} and threads {threads}; both must be at least 1")
        self._library: Library = load_library()
        self._kv_types = kv_types(self._library.api)
        if kv_type not in self._kv_types:
            raise UsageError(f"unknown cache type {kv_type!r}; use --kv-type with one of {', '.join(self._kv_types)}")
        if kv_type not in ("f32", "f16", "bf16") and not flash:
            raise UsageError(
                f"llama.cpp keeps V in {kv_type} only with flash attention; add --flash-attn on, or use --kv-type f16"
            )
        self._threads = threads if threads is not None else os.cpu_count() or 1
        self._n_batch, self._layers, self._fault = n_batch, None if layers is None else frozenset(layers), fault
        self._options = self._configure(kv_type, flash=flash)
        self._open: list[Context] = []
        self._queries: dict[int, NodeKey] = {}
        self._watched = True
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._model: Model | None = None
        self._native_model: Model | None = None
        self._info: EngineFacts | None = None
        self._facts = RouteFacts()
        self._why_no_shift: str | None = None

    @property
    def info(self) -> EngineFacts:
        if self._info is None:
            raise CaptureError("the engine is not open; use it as a context manager: with LlamaCppEngine(path) as e")
        return self._info

    def __enter__(self) -> LlamaCppEngine:
        try:
            self._native_model = self._model = Model(self._library, self._path)
            if not self._model.is_decoder:
                raise EngineUnavailable(
                    f"{self._path.name} is not a decoder-only language model, so it has no step to audit"
                )
            self._info = self._describe(self._model)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free contexts, weights and the files of the clean configurations."""
        self._close_contexts()
        for model in (self._model, self._native_model):
            if model is not None:
                model.close()
        self._model = self._native_model = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    @property
    def routes(self) -> LlamaRoutes:
        """What this file can do beyond `extend`: rows that share one cache."""
        lacking: dict[Ability, str] = {}
        if self.info.why_no_rewind is not None:
            lacking |= {"rewind": self.info.why_no_rewind, "reset": self.info.why_no_rewind}
        if self._why_no_shift is not None:
            lacking |= {"shift": self._why_no_shift}
        return LlamaRoutes(self.new_batch, self._facts, lacking)

    @property
    def encoder(self) -> Callable[[str], list[int]] | None:
        """From text to token ids by the tokenizer in the file; None if it has none."""
        assert self._native_model is not None
        return self.encode if self._native_model.has_tokenizer else None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, by the tokenizer in the file."""
        assert self._native_model is not None
        return self._native_model.encode(text)

    def weight_values(self) -> Iterator[tuple[str, Array]] | None:
        """Yield the name and the numbers of each tensor of the file, dequantised; None without the package gguf."""
        try:
            from gguf import GGUFReader
            from gguf.quants import dequantize
        except ImportError:
            return None
        reader = GGUFReader(self._path)
        return ((tensor.name, dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors)

    def new_sequence(self, max_length: int, *, keep_past: bool = False) -> LlamaSequence:
        """Return an empty sequence in a context of its own; every one can be rewound, if `info` says so."""
        return self.new_batch(1, max_length)[0]

    def new_batch(
        self, n_sequences: int, max_length: int, *, cache: str | None = None, n_spare: int = 0
    ) -> list[LlamaSequence]:
        """Return empty sequences of `max_length` tokens at most that share one context and one cache.

        `kvdrift.engines.llamacpp.sequence.extend_together` feeds several of them in one call.

        Args:
            n_sequences: of the sequences that are returned.
            max_length: of one sequence, in tokens.
            cache: "ring" for cells that are written again behind a window, "split" for a stream of cells for each
                sequence; None for cells of every token in one stream.
            n_spare: further sequences that may be branched off.
        """
        assert self._model is not None
        options = self._options
        if cache == "ring":  # few tokens at once, so that its cells are few and are written again soon
            options = replace(options, is_ring=True, n_batch=min(options.n_batch, RING_BATCH))
        elif cache == "split":
            options = replace(options, is_unified=False)
        context = Context(
            self._library,
            self._model.pointer,
            options,
            ContextSize(max_length=max_length, n_sequences=n_sequences, n_spare=n_spare),
            ContextWatch(
                n_layers=self._model.n_layers,
                layers=self._layers,
                fault=self._fault,
                watched=self._watched,
                shift=self.shift,  # it holds for the contexts that are opened while it is set
                queries=self._queries,
            ),
            on_close=self._open.remove,
        )
        self._open.append(context)
        return list(context.sequences)

    @property
    def kv_type(self) -> str:
        """Type of K and V in the cache, as it is called in the configuration that runs."""
        return self._options.kv_name

    @contextmanager
    def planted(self, fault: Fault | None) -> Iterator[None]:
        """Let `fault` interfere with every call of the contexts that are opened while this one is open."""
        before, self._fault = self._fault, fault
        try:
            yield
        finally:
            self._fault = before

    @contextmanager
    def unobserved(self, *, watched: bool = False) -> Iterator[_NoDraws]:
        """Open contexts without the scheduler's callback while the context is open; see `CanGoUnobserved`.

        The callback makes the scheduler compute the graph in pieces; without it the graph runs as a whole.
        """
        if self._fault is not None:
            raise NotApplicable("a fault is planted through the callback, so that it cannot run without it")
        self._watched = watched
        try:
            yield _NoDraws()
        finally:
            self._watched = True

    @contextmanager
    def at(self, rung: str) -> Iterator[None]:
        """Run in another configuration while the context is open.

        `float32` and `float16` are the clean ones: weights unpacked to that type by llama.cpp's own quantiser, a cache
        of that type, and no flash attention.
        """
        if rung == self.info.dtype:
            yield
            return
        if rung not in _CLEAN:
            raise UsageError(f"unknown configuration {rung!r}; known: {', '.join([self.info.dtype, *_CLEAN])}")
        before = self._model, self._options
        model = Model(self._library, self._file_at(rung))
        self._model, self._options = model, self._configure(_CLEAN[rung], flash=False)
        try:
            yield
        finally:
            self._close_contexts()
            self._model, self._options = before
            model.close()

    def _configure(self, kv_type: str, *, flash: bool) -> ContextOptions:
        return ContextOptions(self._kv_types[kv_type], kv_type, flash, self._threads, self._n_batch)

    def _close_contexts(self) -> None:
        for context in list(self._open):
            context.close()

    def _file_at(self, rung: str) -> Path:
        """Return the file with its weights at `rung`, written when it is first needed."""
        if self._folder is not None:
            folder = self._folder
        else:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="kvdrift-llamacpp-")
            folder = Path(self._temporary.name)
        target = folder / f"{str(self.info.model_hash)[:16]}-{rung}.gguf"
        if not target.exists():
            requantise(self._library, self._path, target, _CLEAN[rung], self._threads)
        return target

    def _describe(self, model: Model) -> EngineFacts:
        weights, options = model.weight_type, self._options
        require_layers(self._layers, self._path.name, model.n_layers)
        found, why_no_rewind, recorder = self._survey(model)
        has_table = recorder.has_table
        window, step = model.window, min(RING_BATCH, options.n_batch)
        self._facts = RouteFacts(
            window=window,
            recurrent=model.is_recurrent,
            exports=tuple(EXPORTS),
            branches=("split",),
            ring=None if window is None else cells_of(window + step),
        )
        self._why_no_shift = why_no_rewind or self._why_no_shift or _why_no_shift(recorder, options, model)
        ladder = LADDER._replace(pinned=_TABLE if has_table else 0.0)
        sites: dict[int | None, tuple[Site, ...]] = {
            layer: tuple(site for site in Site if (layer, site) in found)
            for layer in [None, *range(model.n_layers)]
            if any(place == layer for place, _ in found)
        }
        return EngineFacts(
            engine="llamacpp",
            model=self._path.name,
            model_hash=_sha256(self._path),
            dtype=_native_name(weights, options),
            device="cpu",
            attention=options.attention,
            cache=f"K and V {options.kv_name}",
            n_layers=model.n_layers,
            vocab_size=model.n_vocab,
            max_positions=model.n_positions,
            parameters=model.n_parameters,
            can_rewind=why_no_rewind is None,
            why_no_rewind=why_no_rewind,
            rungs=(ladder.lower, ladder.upper),
            pinned=ladder.pinned,
            roundoffs=_roundoffs(weights, options, ladder.pinned),
            sites=sites_by_layer(sites),
            perturbable=all(Site.LAYER_IN in sites.get(layer, ()) for layer in range(model.n_layers)),
            notes=(
                f"weights {weights}, K and V {options.kv_name}, {options.attention}, n_batch {options.n_batch}, "
                f"{options.threads} threads",
                "the rung float32 is a configuration: weights unpacked to that type by llama.cpp, K and V of that "
                "type, no flash attention",
            ),
            versions={
                "llama-cpp-python": self._library.version,
                "python": platform.python_version(),
                "cpu features": self._library.api.llama_print_system_info().decode(errors="replace").strip(" |"),
            },
        )

    def _survey(self, model: Model) -> tuple[set[tuple[int | None, Site]], str | None, GraphRecorder]:
        """Feed a few tokens: which sites does this graph show, can the cache go back, and what else did it show?"""
        tokens = tuple(range(1, _SURVEY_TOKENS + 1)) if model.n_vocab > _SURVEY_TOKENS else (0,) * _SURVEY_TOKENS
        trace = Trace("survey", "prefill", "survey", "", tokens)
        with self.planted(None):
            sequence = self.new_sequence(_SURVEY_TOKENS)
        try:
            sequence.extend(tokens, probe=range(_SURVEY_TOKENS), sink=trace)
            why = None
            if not sequence.context.can_shift:  # to try ends the process
                self._why_no_shift = "llama.cpp moves no tokens in the cache of this model (llama_memory_can_shift)"
            try:
                sequence.rewind(1)
            except CaptureError as error:
                why = str(error)
        finally:
            with suppress(CaptureError):
                sequence.close()
        return trace.places(), why, sequence.context.recorder


def _why_no_shift(recorder: GraphRecorder, options: ContextOptions, model: Model) -> str | None:
    """Why cached keys cannot be moved to other positions, None if they can."""
    if not recorder.has_rotation:
        return "the graph of this model shows no rotation of queries, and keys that are not rotated cannot be moved"
    is_packed = options.kv_name not in ("f32", "f16", "bf16")
    if is_packed and model.key_width is not None and model.key_width % _HADAMARD:
        # llama-cpp-python 0.3.36: it ends the process (ggml-org/llama.cpp#25636).
        return f"llama.cpp cannot turn keys packed as {options.kv_name} whose heads are {model.key_width} wide"
    return None


def _native_name(weights: str, options: ContextOptions) -> str:
    """The name of the shipped configuration; a clean one is called as its rung is."""
    for rung, kv_type in _CLEAN.items():
        if (weights, options.kv_name, options.flash) == (kv_type, kv_type, False):
            return rung
    return f"{weights}-kv_{options.kv_name}-{'flash' if options.flash else 'no_flash'}"


def _roundoffs(weights: str, options: ContextOptions, pinned: float) -> Roundoffs:
    """How coarsely each kind of operation rounds in this configuration; every value that is handed on is float32."""
    # What flash attention reads of a cache in float32 is cast to float16 first, and is what is recorded.
    held = "f16" if options.flash and options.kv_name == "f32" else options.kv_name
    stored = _STORED.get(held, _FOUR_BITS)
    # Queries are brought to the type that the keys are multiplied in: their own, or 8-bit blocks.
    attention = _PRODUCT.get(options.kv_name, _BLOCKS)
    if options.flash:
        attention = max(attention, _FLASH)
    product = max(_PRODUCT.get(weights, _BLOCKS), pinned)
    return Roundoffs(row_wise=2.0**-24, product=product, cache=stored, attention=attention)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
