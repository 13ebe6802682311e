"""Writes a trace directory out of any Python program: arrays, token ids, and what the program knows of itself.

The program needs numpy, and ml_dtypes for bfloat16. docs/trace-format.md says what each piece is for and what becomes
of a verdict without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from kvdrift.errors import TraceError, UsageError
from kvdrift.trace.manifest import RecordEntry
from kvdrift.trace.model import CacheRecord, PassName, RowRecord, Trace
from kvdrift.trace.parts import part_of
from kvdrift.trace.ranks import RankPart
from kvdrift.trace.readers.absent import absent_sites
from kvdrift.trace.readers.written import (
    DECODE,
    FORMAT,
    FORMAT_VERSION,
    OF_AUDITS,
    PREFILL,
    PREFILL_AGAIN,
    RUNGS,
    WrittenManifest,
    WrittenTrace,
)
from kvdrift.trace.store import DTYPE_NAMES, MANIFEST, write_trace
from kvdrift.vocabulary.facts import AttentionSpec, Call, EngineFacts, encoded_name
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import CACHE_SITES, Site


class Writer:
    """A directory of traces in the making; `finish` writes the manifest that makes it one.

    Args:
        directory: is created; it may exist if it is empty.
        engine: what computed the values, such as "myengine 0.3".
        model: which model, in words.
        dtype: the dtype that the engine computes in: bfloat16, float16, float32 or float64.
        n_layers: layers of the model.
        absent: sites that the model does not have, such as "q_norm"; others that are missing were not recorded.
        facts: model_hash, device, attention, cache, vocab_size, max_positions, parameters, versions (a dict) and notes
            (a list), as far as they are known. What is left out stays unknown.

    Raises:
        UsageError: the directory holds something, or an argument is none of these.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        engine: str,
        model: str,
        dtype: str,
        n_layers: int,
        absent: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        self.directory = Path(directory)
        _check_rung(dtype)
        try:
            self._absent = sorted(absent_sites(absent, "the writer"))
        except TraceError as error:
            raise UsageError(str(error)) from error
        try:
            stated = {"engine": engine, "model": model, "dtype": dtype, "n_layers": n_layers, **facts}
            self._engine = msgspec.convert(stated, EngineFacts)
        except (TypeError, msgspec.ValidationError) as error:
            raise UsageError(f"a fact about the engine cannot be written: {error}") from error
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if any(self.directory.iterdir()):
                raise UsageError(f"{self.directory} is not empty; name a new directory for the traces")
        except OSError as error:
            raise UsageError(f"cannot write traces to {self.directory}: {error.strerror}") from error
        self._traces: list[WrittenTrace] = []
        self._folders: dict[str, str] = {}

    def prefill(self, prompt: str, tokens: Sequence[int], *, dtype: str | None = None) -> Pass:
        """Return the pass that computes all `tokens` of the prompt named `prompt` at once."""
        return self._pass(PREFILL, prompt, tokens, None, dtype)

    def decode(
        self, prompt: str, tokens: Sequence[int], *, mode: str = "as_designed", dtype: str | None = None
    ) -> Pass:
        """Return the pass that computes the last ones of the same `tokens` one by one on top of a cache.

        Args:
            prompt: the name that the prefill has.
            tokens: all token ids, those of the prompt included.
            mode: "kv_aligned" if each step reads the very rows that the prefill of all tokens wrote.
            dtype: where it is not that of the engine: a rung of the precision ladder.
        """
        if mode not in tuple(Mode):
            raise UsageError(f"unknown mode {mode!r}; use as_designed or kv_aligned")
        return self._pass(DECODE, prompt, tokens, mode, dtype)

    def prefill_again(self, prompt: str, tokens: Sequence[int], *, dtype: str | None = None) -> Pass:
        """Return another prefill of the first ones of the same tokens: what it differs by is the engine's own noise."""
        return self._pass(PREFILL_AGAIN, prompt, tokens, None, dtype)

    def add(self, trace: Trace, *, mode: str | None = None, again: bool = False) -> None:
        """Write a pass that was recorded elsewhere: a decode in a mode, a prefill without one, or another prefill."""
        kind = DECODE if mode is not None else PREFILL_AGAIN if again else PREFILL
        self._add(trace, kind, mode)

    def finish(self) -> None:
        """Write the manifest; the directory can be judged from then on.

        Raises:
            UsageError: no pass was written, or the directory cannot be written.
        """
        if not self._traces:
            raise UsageError("no pass was written, so there is nothing to judge; use prefill(...) and decode(...)")
        manifest = WrittenManifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            engine=self._engine,
            traces=self._traces,
            absent=[str(site) for site in self._absent],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        fields = msgspec.to_builtins(manifest)
        if not self._absent:
            del fields["absent"]
        for name in OF_AUDITS:
            del fields["engine"][encoded_name(name)]
        data = msgspec.json.format(msgspec.json.encode(fields), indent=1)
        try:
            (self.directory / MANIFEST).write_bytes(data)
        except OSError as error:
            raise UsageError(f"cannot write traces to {self.directory}: {error.strerror}") from error

    def _pass(self, kind: str, prompt: str, tokens: Sequence[int], mode: str | None, dtype: str | None) -> Pass:
        rung = dtype or self._engine.dtype
        _check_rung(rung)
        name: PassName = "decode" if kind == DECODE else "prefill"
        trace = Trace(prompt, name, mode or kind, rung, tuple(int(token) for token in tokens))
        return Pass(self, trace, kind, mode)

    def _add(self, trace: Trace, kind: str, mode: str | None) -> None:
        folder = self._folders.setdefault(trace.prompt, f"{len(self._folders):03d}")
        name = f"{folder}/{trace.rung}/{kind}" + (f".{mode}" if mode else "")
        if any(entry.name == name for entry in self._traces):
            raise UsageError(f"{trace.prompt!r} at {trace.rung} has two passes {kind}{f' in {mode}' if mode else ''}")
        try:
            entry = write_trace(self.directory, name, trace)
        except OSError as error:
            raise UsageError(f"cannot write traces to {self.directory}: {error.strerror}") from error
        self._traces.append(
            WrittenTrace(
                name=name,
                file=entry.file,
                prompt=entry.prompt,
                pass_name=kind,
                rung=entry.rung,
                tokens=entry.tokens,
                records=entry.records,
                mode=mode,
                calls=entry.calls,
                attention=entry.attention,
                sha256=entry.sha256,
            )
        )


class Pass:
    """One pass in the making. Used as a context, it is written when the context ends without an error."""

    def __init__(self, writer: Writer, trace: Trace, kind: str, mode: str | None) -> None:
        self._writer, self._trace, self._kind, self._mode = writer, trace, kind, mode
        self._recorded: set[tuple[int | None, Site, int, RankPart | None]] = set()

    def __enter__(self) -> Pass:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    def close(self) -> None:
        """Write the pass."""
        self._writer._add(self._trace, self._kind, self._mode)

    def call(
        self,
        start: int,
        q_len: int,
        cache_len_before: int,
        *,
        kv_len: int | None = None,
        attention: str = "unknown",
        kernels: Sequence[str] = (),
    ) -> None:
        """Note one forward call as the engine made it: path proof.

        Args:
            start: position of the first token that was fed.
            q_len: how many tokens were fed.
            cache_len_before: how many the cache held before.
            kv_len: how many keys attention read.
            attention: name of the attention implementation.
            kernels: names of the kernels that ran.
        """
        self._trace.calls.append(Call(start, q_len, cache_len_before, kv_len, attention, tuple(kernels)))

    def rows(
        self,
        site: str,
        values: np.ndarray[Any, Any],
        *,
        positions: Sequence[int],
        layer: int | None = None,
        slots: Sequence[int] | None = None,
        rank: int | None = None,
        heads: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> None:
        """Record `values` [position, ...] of a site, in the dtype in which the engine has them.

        Attention rows (`attn_scores`, `attn_probs`) are [position, head, key], and `slots` says which position each key
        column holds (0, 1, 2 ... if left out); a masked score is -inf.

        A rank of an engine that splits its layers records its part: `heads` or `columns` (first, stop) say which,
        `rank` whose it is. With a `rank` alone the values are an addend of a sum; the sum is recorded without one.
        """
        known = _site(site)
        values = _array(known, values)
        if known in (Site.ATTN_SCORES, Site.ATTN_PROBS) and slots is None:
            slots = range(values.shape[-1])
        where = self._checked(positions)
        if values.ndim == 0 or len(values) != len(where):
            raise UsageError(f"{site} has the shape {list(values.shape)} for {len(where)} positions")
        keys = None if slots is None else np.asarray(slots, dtype=np.int64)
        part = self._part(layer, known, where, rank, heads, columns)
        self._present(known)
        self._trace.rows.append(RowRecord(layer, known, where, values.copy(), keys, part))

    def cache(
        self,
        site: str,
        rows: np.ndarray[Any, Any],
        *,
        position: int,
        layer: int,
        slots: Sequence[int] | None = None,
        rank: int | None = None,
        heads: tuple[int, int] | None = None,
    ) -> None:
        """Record the `rows` [slot, head, dim] of `k_cache` or `v_cache` that attention read at `position`.

        `slots` gives the position of the token that each row belongs to; 0, 1, 2 ... if left out. `rank` and `heads`
        are those of `rows`.
        """
        known = _site(site)
        rows = _array(known, rows)
        if known not in CACHE_SITES or rows.ndim != 3:
            raise UsageError(
                f"{site} {list(rows.shape)} is not a cache read; k_cache and v_cache are [slot, head, dim]"
            )
        keys = np.arange(len(rows)) if slots is None else np.asarray(slots, dtype=np.int64)
        if len(keys) != len(rows):
            raise UsageError(f"{site} has {len(rows)} rows and {len(keys)} slots")
        where = self._checked([position])
        part = self._part(layer, known, where, rank, heads, None)
        self._present(known)
        if part is None:
            self._trace.add_cache_read(layer, known, where, keys, rows.copy())
        else:
            self._trace.cache.append(CacheRecord(layer, known, where, keys, np.arange(len(keys)), rows.copy(), part))

    def attention(
        self,
        layer: int,
        *,
        scale: float,
        softcap: float | None = None,
        window: int | None = None,
        sinks: Sequence[float] | None = None,
        slopes: Sequence[float] | None = None,
    ) -> None:
        """Say how a layer attends, so that its attention can be replayed (`kvdrift.vocabulary.facts.AttentionSpec`)."""
        sinks, slopes = (None if given is None else tuple(float(x) for x in given) for given in (sinks, slopes))
        self._trace.add_attention(layer, AttentionSpec(scale, softcap, window, sinks=sinks, slopes=slopes))

    def _part(
        self,
        layer: int | None,
        site: Site,
        positions: tuple[int, ...],
        rank: int | None,
        heads: tuple[int, int] | None,
        columns: tuple[int, int] | None,
    ) -> RankPart | None:
        """Return what the values are a part of, None if they are whole; the same values may be recorded once."""
        spans = None if heads is None else list(heads), None if columns is None else list(columns)
        try:
            part = part_of(RecordEntry("values", str(site), layer, [*positions], None, None, rank, *spans))
        except ValueError as error:
            raise UsageError(f"{site}: {error}") from error
        for position in positions:
            if (place := (layer, site, position, part)) in self._recorded:
                where = f"{site}{'' if layer is None else f' of layer {layer}'} at position {position}"
                raise UsageError(
                    f"{where} is recorded a second time; if each rank holds a part, say which: heads=(first, stop), "
                    "columns=(first, stop) or rank=..."
                )
            self._recorded.add(place)
        return part

    def _present(self, site: Site) -> None:
        if site in self._writer._absent:
            raise UsageError(f"{site} is named as absent from the model; leave it out of absent=, or do not record it")

    def _checked(self, positions: Sequence[int]) -> tuple[int, ...]:
        found = tuple(int(position) for position in positions)
        if not found or not all(0 <= position < len(self._trace.tokens) for position in found):
            raise UsageError(
                f"the positions {list(found)} are not among the {len(self._trace.tokens)} tokens of the pass"
            )
        return found


def _site(name: str) -> Site:
    try:
        return Site(name)
    except ValueError as error:
        raise UsageError(f"unknown site {name!r}; the sites are {', '.join(Site)}") from error


def _array(site: Site, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found = np.asarray(values)
    if found.dtype not in DTYPE_NAMES or found.dtype == np.int64 or not found.size:
        raise UsageError(
            f"{site} is {found.dtype} {list(found.shape)}; record float64, float32, float16, bfloat16 or float8 values"
        )
    return found


def _check_rung(dtype: str) -> None:
    if dtype not in RUNGS:
        raise UsageError(f"unknown dtype {dtype!r}; use one of {', '.join(RUNGS)}")
