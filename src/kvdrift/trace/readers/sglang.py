"""Files of SGLang's dumper: one .pt a tensor, `{"value": ..., "meta": ...}`, named by their tags.

A forward pass is a step of one experiment folder. Token ids and positions come from `input_ids` and `positions`, which
the dumper writes in its core mode. One request at a time: tokens of several requests in one step are not told apart.

Ranks of tensor parallelism hold columns of the projections and of the attention's output, and copies of everything that
a collective has summed up or gathered. Columns are joined in the order of the ranks, and copies must be the same bits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvdrift.errors import TraceError
from kvdrift.trace.model import Array, Trace
from kvdrift.trace.parts import Piece, join
from kvdrift.trace.ranks import RankPart
from kvdrift.trace.readers.passes import LoadedPass, PassFiles, read_stated, recording_of
from kvdrift.trace.readers.written import DECODE, PREFILL, PREFILL_AGAIN
from kvdrift.trace.recording import MAX_POSITION, Recording, files_under
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import AFTER_LAYERS, BEFORE_LAYERS, Site

ReadFile = Callable[[Path], Any]

_MODULE = re.compile(
    r"(?:non_intrusive__)?(?:model\.)?(?:layers\.(?P<layer>\d+)\.)?(?P<module>[a-z_.]+?)\.output(?:\.\d+)?$"
)
_MODULES = {
    "embed_tokens": Site.EMBED_OUT,
    "self_attn.q_proj": Site.Q_PROJ,
    "self_attn.k_proj": Site.K_PROJ,
    "self_attn.v_proj": Site.V_PROJ,
    "self_attn.attn": Site.ATTN_CTX,
    "self_attn.o_proj": Site.ATTN_OUT,
    "mlp": Site.MLP_OUT,
    "lm_head": Site.LOGITS,
}
_FLOATS = ("bfloat16", "float16", "float32", "float64")


# Sites of which each rank holds columns. Keys and values of fewer heads than ranks are held in copies; logits too,
# where they were gathered.
_SPLIT = frozenset({Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.Q_NORM, Site.K_NORM, Site.Q_ROPE, Site.K_ROPE})
_SPLIT |= {Site.ATTN_CTX, Site.LOGITS}


class _Dump(NamedTuple):
    name: str
    layer: int | None
    path: Path
    rank: int


@dataclass(frozen=True, slots=True)
class _DumpStep:
    """One forward pass: the experiment folder, its number, and its files by tensor name and layer."""

    folder: Path
    number: int
    tokens: tuple[int, ...]
    start: int
    files: tuple[_Dump, ...]


def open_sglang(directory: Path, read: ReadFile) -> Recording:
    """Open a directory of dumps; `read` returns what a .pt file holds, tensors as arrays.

    Raises:
        TraceError: there are none, or a step is damaged, of several requests, or without token ids and positions.
    """
    tags = [(path, _tags(path)) for path in files_under(directory, ".pt")]
    if not tags:
        raise TraceError(f"{directory} holds no .pt file")
    files: dict[tuple[Path, int], list[_Dump]] = defaultdict(list)
    for path, tag in tags:
        rank = _number(path, tag, "rank") if "rank" in tag else 0
        files[path.parent, _number(path, tag, "step", "forward_pass_id")].append(
            _Dump(tag["name"], _layer(path, tag), path, rank)
        )
    n_ranks = len({dump.rank for found in files.values() for dump in found})
    steps = [_step(folder, number, found, read) for (folder, number), found in sorted(files.items())]
    passes = _passes(steps, read)
    kind = f"SGLang dumps of {len(steps)} forward passes" + (f" on {n_ranks} ranks" if n_ranks > 1 else "")
    return recording_of(kind, "sglang", passes, read_stated(directory))


def _tags(path: Path) -> dict[str, str]:
    """The tags in a file name: key=value, parted by three underscores."""
    found = dict(part.split("=", 1) for part in path.name.removesuffix(".pt").split("___") if "=" in part)
    if "name" not in found:
        raise TraceError(
            f"{path} is not named as SGLang's dumper names its files (step=0___rank=0___...___name=NAME.pt)"
        )
    return found


def _number(path: Path, tags: dict[str, str], *names: str) -> int:
    text = next((tags[name] for name in names if name in tags), "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise TraceError(f"{path}: the name gives no number for {names[0]}")
    return int(text)


def _layer(path: Path, tags: dict[str, str]) -> int | None:
    return _number(path, tags, "layer_id") if "layer_id" in tags else None


def _value(path: Path, read: ReadFile) -> np.ndarray[Any, Any]:
    found = read(path)
    value = found.get("value") if isinstance(found, dict) else None
    if not isinstance(value, np.ndarray):
        raise TraceError(f"{path} does not hold a tensor under 'value'")
    return value


def _step(folder: Path, number: int, files: list[_Dump], read: ReadFile) -> _DumpStep:
    where = f"step {number} of {folder}"
    core = ("input_ids", "positions", "seq_lens")
    found = {dump.name: dump.path for dump in sorted(files, key=lambda dump: -dump.rank) if dump.name in core}
    if not {"input_ids", "positions"} <= found.keys():
        raise TraceError(f"{where} lacks input_ids or positions; let the dumper write its core tensors as well")
    ids, positions = (_value(found[name], read).reshape(-1) for name in ("input_ids", "positions"))
    if "seq_lens" in found and _value(found["seq_lens"], read).size > 1:
        raise TraceError(f"{where} holds several requests; send one at a time while dumping")
    if ids.dtype.kind not in "iu" or len(ids) != len(positions) or not len(ids):
        raise TraceError(f"{where} has {len(ids)} input_ids ({ids.dtype}) and {len(positions)} positions")
    start = int(positions[0])
    if not 0 <= start < MAX_POSITION or not np.array_equal(positions, np.arange(start, start + len(ids))):
        raise TraceError(
            f"{where} has positions that do not follow each other; send one request at a time while dumping"
        )
    return _DumpStep(folder, number, tuple(int(i) for i in ids), start, tuple(files))


def _passes(steps: list[_DumpStep], read: ReadFile) -> list[PassFiles]:
    """Follow every decoded sequence, and find the prefill of all its tokens."""
    prefills = [step for step in steps if step.start == 0 and len(step.tokens) > 1]
    passes: list[PassFiles] = []
    taken: set[tuple[Path, int]] = set()
    for first in prefills:
        chain = _chain(first, steps)
        if not chain:
            continue
        tokens = first.tokens + tuple(token for step in chain for token in step.tokens)
        full = next((s for s in prefills if s is not first and s.tokens[: len(tokens)] == tokens), None)
        name = f"{first.folder.name}.{first.number}"
        passes.append(PassFiles(first.folder, name, DECODE, Mode.AS_DESIGNED, partial(_load, chain, name, read)))
        passes.append(PassFiles(first.folder, name, PREFILL_AGAIN, None, partial(_load, [first], name, read)))
        if full is not None:
            taken.add((full.folder, full.number))
            passes.append(PassFiles(full.folder, name, PREFILL, None, partial(_load, [full], name, read)))
    if not passes:
        raise TraceError("no decoded sequence was dumped: a prefill, followed by steps of one token each")
    if not taken:
        raise TraceError(
            "no prefill of a whole decoded sequence was dumped; send its prompt and its generated tokens once more as "
            "one prompt, with the prefix cache off"
        )
    return [item for item in passes if any(p.kind == PREFILL and p.prompt == item.prompt for p in passes)]


def _chain(first: _DumpStep, steps: list[_DumpStep]) -> list[_DumpStep]:
    """The steps of one token each that follow a prefill in its folder."""
    chain: list[_DumpStep] = []
    position = len(first.tokens)
    for step in sorted(
        (s for s in steps if s.folder == first.folder and s.number > first.number), key=lambda s: s.number
    ):
        if len(step.tokens) != 1 or step.start != position:
            break
        chain.append(step)
        position += 1
    return chain


def _load(steps: list[_DumpStep], prompt: str, read: ReadFile, tokens: tuple[int, ...] | None) -> LoadedPass:
    decoding = steps[0].start > 0
    known = tokens if tokens is not None and decoding else steps[0].tokens
    trace = Trace(prompt, "decode" if decoding else "prefill", "sglang", "", known)
    strange: dict[str, None] = {}
    for step in steps:
        trace.calls.append(Call(step.start, len(step.tokens), step.start, None, "unknown", ()))
        by_place: dict[tuple[Site, int | None], list[tuple[int, Array]]] = defaultdict(list)
        for name, tagged, path, rank in sorted(step.files, key=lambda dump: dump.rank):
            place = _place(name, tagged)
            if place is None:
                if name not in ("input_ids", "positions", "seq_lens"):
                    strange.setdefault(name)
                continue
            rows = _rows(path, len(step.tokens), read)
            if any(known == rank for known, _ in by_place[place]):
                raise TraceError(f"{path}: {place[0]} is there twice on rank {rank} in step {step.number}")
            by_place[place].append((rank, rows))
            trace.rung = trace.rung or rows.dtype.name
        for (site, layer), found in by_place.items():
            end = step.start + len(step.tokens)
            positions = tuple(range(end - len(found[0][1]), end))
            if len(found) == 1:
                trace.add_rows(layer, site, positions, found[0][1])
            else:
                join(_pieces(site, layer, positions, found), trace, step.folder)
    if not trace.rows:
        raise TraceError(f"step {steps[0].number} of {steps[0].folder} has no tensor of a known site")
    return LoadedPass(trace, strange=tuple(strange))


def _rows(path: Path, n: int, read: ReadFile) -> Array:
    """The rows [token, feature] of a dump of `n` tokens, or of the last one alone."""
    values = _value(path, read)
    if values.dtype.name not in _FLOATS or not values.size or values.ndim < 1:
        raise TraceError(f"{path} is {values.dtype} {list(values.shape)}; dump floating-point values")
    if len(values) not in (n, 1):
        raise TraceError(f"{path} has {len(values)} rows for {n} tokens")
    return values.reshape(len(values), -1)


def _pieces(
    site: Site, layer: int | None, positions: tuple[int, ...], found: Sequence[tuple[int, Array]]
) -> Iterator[Piece]:
    """What each rank holds of a tensor: columns one after the other, or copies."""
    is_split = site in _SPLIT and any(rows.tobytes() != found[0][1].tobytes() for _, rows in found)
    start = 0
    for rank, rows in found:
        stop = start + rows.shape[1]
        yield Piece(layer, site, positions, RankPart(rank, "columns", (start, stop)), rows)
        start = stop if is_split else 0


def _place(name: str, tagged: int | None) -> tuple[Site, int | None] | None:
    """The site and layer of a tensor: its own name is a site, or it is the output of a module that gives one."""
    match = _MODULE.match(name)
    layer = int(match["layer"]) if match and match["layer"] else tagged
    site = Site(name) if name in Site.__members__.values() else _MODULES.get(match["module"]) if match else None
    if site is None:
        return None
    outside = site in BEFORE_LAYERS | AFTER_LAYERS
    return None if layer is None and not outside else (site, None if outside else layer)
