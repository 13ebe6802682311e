"""The spec of a sweep: a TOML file, checked to the last key before anything runs."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvdrift.errors import UsageError

ENGINE_NAMES = ("hf", "llamacpp", "mlx")


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model under one name in several engines, and what it needs.

    Attributes:
        memory: of one cell, such as "4 GB"; None lets the size of its files say it.
        cpus, gpus: of one cell; a backend that places cells keeps them free.
    """

    name: str
    hf: str | None = None
    llamacpp: str | None = None
    mlx: str | None = None
    memory: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """The axes; a sweep has a cell for each combination of their values."""

    models: tuple[str | ModelSpec, ...]
    engines: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ("decode",)
    lengths: tuple[int | str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    pairs: tuple[tuple[str, str], ...] = ()


class AuditOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What all cells have in common."""

    span: int = 4
    mode: str = "both"
    ladder: str = "model"
    traces: bool = False
    layers: str | None = None


class SweepSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A spec as it was read. `alpha` is the chance of a false alarm that the whole sweep may have."""

    matrix: Matrix
    name: str = "sweep"
    alpha: float = 1e-3
    prompts: dict[str, str | tuple[int, ...]] = {}
    audit: AuditOptions = AuditOptions()


_TABLES: Mapping[str, type[msgspec.Struct]] = {"matrix": Matrix, "audit": AuditOptions}


def read_spec(path: Path) -> SweepSpec:
    """Return the spec in a file. Models that begin with "." are looked for beside the file.

    Raises:
        UsageError: the file cannot be read, a key is unknown or has a wrong value; the message names both.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the spec {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    _refuse_unknown(path, "", data, SweepSpec)
    for table, kind in _TABLES.items():
        if isinstance(data.get(table), dict):
            _refuse_unknown(path, f"{table}.", data[table], kind)
    models = data["matrix"].get("models", ()) if isinstance(data.get("matrix"), dict) else ()
    for model in models if isinstance(models, list) else ():
        if isinstance(model, dict):
            _refuse_unknown(path, "matrix.models.", model, ModelSpec)
    try:
        spec = msgspec.convert(data, SweepSpec)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}; docs/sweep.md lists the keys and their values") from error
    if not 0 < spec.alpha < 1:
        raise UsageError(f"{path}: alpha is {spec.alpha}, and must lie between 0 and 1; write alpha = 0.001")
    return msgspec.structs.replace(spec, matrix=_placed(spec.matrix, path.absolute().parent))


def _refuse_unknown(path: Path, where: str, data: Mapping[str, Any], kind: type[msgspec.Struct]) -> None:
    known = kind.__struct_fields__
    for key in data:
        if key not in known:
            raise UsageError(f"{path}: unknown key {where + key!r}; allowed here: {', '.join(known)}")


def _placed(matrix: Matrix, folder: Path) -> Matrix:
    """Make paths that are written as such absolute: a worker may run in another folder."""

    def place(name: str | None) -> str | None:
        if name is None:
            return None
        prefix, colon, rest = name.partition(":")
        if prefix not in ENGINE_NAMES or not colon:
            prefix, colon, rest = "", "", name
        is_path = rest.startswith(".") or (rest.endswith(".gguf") and not rest.startswith(("/", "~")))
        return prefix + colon + (str((folder / rest).resolve()) if is_path else rest)

    models: list[str | ModelSpec] = []
    for model in matrix.models:
        if isinstance(model, str):
            models.append(place(model) or model)
        else:
            models.append(
                msgspec.structs.replace(model, **{name: place(getattr(model, name)) for name in ENGINE_NAMES})
            )
    return msgspec.structs.replace(matrix, models=tuple(models))


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not allowed.

    Raises:
        UsageError: with the key and the allowed values.
    """
    if value not in allowed:
        raise UsageError(f"{key} has {value!r}; allowed: {', '.join(allowed)}")


_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def parse_memory(text: str) -> int:
    """Return bytes.

    >>> parse_memory("4 GB"), parse_memory("500MB")
    (4000000000, 500000000)
    """
    number = text.strip().rstrip("KMGTBkmgtb").strip()
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        size = float(number) * _UNITS[unit]
        if not 0 < size < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        raise UsageError(f"memory is {text!r}; write it as 500 MB or 4 GB") from None
    return int(size)
