"""The files of a GRETA trace directory: the prompt, mode, seed and pass of each, and the facts beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvdrift.errors import AlignmentError, TraceError
from kvdrift.trace.recording import files_under, inside
from kvdrift.vocabulary.plan import Mode

LOGITS = ("logits.jsonl", "logits.jsonl.gz")
_SUFFIX = re.compile(r"(?:_trace)?\.jsonl(?:\.gz)?$")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}
_KNOWN = ("bfloat16", "float16", "float32", "float64")
# Facts that must agree in all files of a directory, and under which names they are written.
_CHECKED = {
    "dtype": ("dtype",),
    "model": ("model", "model_path"),
    "model_hash": ("model_hash", "model_sha256"),
    "device": ("device", "gpu"),
    "version": ("git_commit", "engine_version", "version", "commit"),
}
_MAX_FACTS = 16 << 20  # bytes of a config or metadata file


@dataclass(frozen=True, slots=True)
class GretaFile:
    """One file. `origin` is the run that wrote it, prefill or decode, None if it holds both; `mode` None if it has
    none."""

    path: Path
    prompt: str
    mode: Mode | None
    origin: str | None
    is_logits: bool


def find_files(directory: Path) -> list[GretaFile]:
    """Return the trace files and logits dumps under a directory.

    Raises:
        TraceError: one of them is a link that leads out of it.
    """
    return [_describe(directory, path) for path in files_under(directory, ".jsonl", ".jsonl.gz")]


def read_facts(directory: Path) -> dict[str, str]:
    """Return what the config.json and metadata.json files under a directory say, as strings.

    Raises:
        AlignmentError: two of them disagree: they are not of one engine.
    """
    found: dict[str, tuple[str, Path]] = {}
    for path in files_under(directory, "config.json", "metadata.json"):
        if path.name not in ("config.json", "metadata.json"):
            continue
        facts = _json(path)
        for name, keys in _CHECKED.items():
            value = next((facts[key] for key in keys if isinstance(facts.get(key), str)), None)
            if not isinstance(value, str) or not value:
                continue
            value = _DTYPES.get(value.lower(), value.lower()) if name == "dtype" else value
            known, where = found.setdefault(name, (value, path))
            if known != value:
                raise AlignmentError(
                    f"the facts disagree: {name} is {known!r} in {where} and {value!r} in {path}; judge traces of one "
                    "engine, model and dtype at a time"
                )
    facts_only = {name: value for name, (value, _) in found.items()}
    if facts_only.get("dtype") not in (None, *_KNOWN):
        facts_only["storage"] = facts_only.pop("dtype")  # of the weights, such as q4_k: not what is computed in
    return facts_only


def ordered(files: list[GretaFile]) -> Iterator[GretaFile]:
    """Yield files by prompt and mode, traces before logits dumps."""
    yield from sorted(files, key=lambda f: (f.prompt, str(f.mode), f.is_logits, f.origin or "", str(f.path)))


def _describe(directory: Path, path: Path) -> GretaFile:
    parts = path.relative_to(directory).parts
    folders = parts[:-1]
    is_logits = path.name in LOGITS
    stem = _SUFFIX.sub("", path.name)
    mode, origin = _mode_of_folders(folders), _origin_of_folders(folders)
    for known in Mode:
        if f"_{known}" in stem:
            stem, mode = stem.replace(f"_{known}", ""), known
    if stem.endswith("_decode"):
        stem, origin = stem.removesuffix("_decode"), "decode"
    elif stem.endswith("_prefill"):
        stem, origin = stem.removesuffix("_prefill"), "prefill"
    elif origin is None and _decode_sibling(path).exists():
        origin = "prefill"
    named = [f for f in folders if not re.fullmatch(r"kv_aligned_\w+|seed_\w+|prefill|decode|runs|traces|run", f)]
    if is_logits or stem in ("internal", "trace"):
        stem = named[-1] if named else "prompt"
    seed = next((folder for folder in folders if folder.startswith("seed_")), None)
    if mode is None:
        mode = _mode_beside(directory, path.parent)
    return GretaFile(path, stem if seed is None else f"{stem}/{seed}", mode, origin, is_logits)


def _decode_sibling(path: Path) -> Path:
    return path.with_name(path.name.replace("_trace.jsonl", "_decode_trace.jsonl"))


def _mode_of_folders(folders: tuple[str, ...]) -> Mode | None:
    if "kv_aligned_1" in folders or "kv_aligned" in folders:
        return Mode.KV_ALIGNED
    return Mode.AS_DESIGNED if "kv_aligned_0" in folders or "as_designed" in folders else None


def _origin_of_folders(folders: tuple[str, ...]) -> str | None:
    return next((folder for folder in reversed(folders) if folder in ("prefill", "decode")), None)


def _mode_beside(directory: Path, folder: Path) -> Mode | None:
    """The mode that the metadata.json or config.json of a folder, or of one above it, gives."""
    for place in (folder, *folder.parents):
        if not place.is_relative_to(directory):
            break
        for name in ("metadata.json", "config.json"):
            path = place / name
            value = _json(inside(directory, path)).get("kv_aligned") if path.is_file() else None
            if value in (0, 1):  # as are False and True; a list names all the modes of a matrix of runs
                return Mode.KV_ALIGNED if value else Mode.AS_DESIGNED
    return None


def _json(path: Path) -> Mapping[str, object]:
    try:
        if path.stat().st_size > _MAX_FACTS:
            raise TraceError(f"{path} is larger than {_MAX_FACTS >> 20} MB, so it holds no facts")
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path} is not a JSON object: {error}") from error
