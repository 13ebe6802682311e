"""The cells of a spec: every combination of the axes, each with a name of its own and what it needs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from kvdrift.engines.open import find_engine
from kvdrift.errors import UsageError
from kvdrift.scenarios.catalogue import choose_scenarios
from kvdrift.sweep.spec import ENGINE_NAMES, ModelSpec, SweepSpec, one_of, parse_memory
from kvdrift.vocabulary.plan import AuditPlan, parse_layers, parse_lengths

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_CACHES = {
    "hf": ("dynamic", "static"),
    "mlx": ("default", "batch", "quantized", "rotating", "chunked"),
    "llamacpp": ("f32", "f16", "bf16", "q8_0", "q4_0"),
}
# The float64 rung holds the model in 8 bytes a weight beside the native one; two bytes a weight on disk are usual.
_TIMES = {"model": 5.0, "layer": 1.5, "off": 1.5}
_BASE = 600_000_000  # torch and transformers themselves


class CellState(StrEnum):
    """How a cell ended."""

    PASS = "PASS"  # EXACT or STRUCTURAL_DRIFT
    FAIL = "FAIL"  # MISMATCH
    INCONCLUSIVE = "INCONCLUSIVE"
    ERROR = "ERROR"  # no verdict: the model failed, its process died, it took too long
    NOT_APPLICABLE = "NOT_APPLICABLE"
    MISSING = "MISSING"  # it has not run


class SweepCell(msgspec.Struct, frozen=True, kw_only=True):
    """One audit, or one comparison of two engines (`versus` is the second). None: as the engine has it by default.

    `why_not` says why the combination does not apply; None if it does.
    """

    id: str
    model: str
    engine: str
    target: str
    versus: str | None = None
    dtype: str | None = None
    attention: str | None = None
    cache: str | None = None
    scenario: str = "decode"
    prompt: str | None = None
    lengths: str | None = None
    seed: int = 0
    memory: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    why_not: str | None = None


def expand(spec: SweepSpec) -> tuple[SweepCell, ...]:
    """Return the cells of a spec. An axis that an engine does not have is one cell there.

    Raises:
        UsageError: a value is not allowed, the matrix is empty, or a cell is declared twice.
    """
    _check(spec)
    cells = [*_audits(spec), *_pairs(spec)]
    if not cells:
        raise UsageError(
            "the matrix is empty: no model runs in an engine that is named; see matrix.models and .engines"
        )
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise UsageError(f"the cell {cell.id} is declared twice; name each value of an axis once")
        seen.add(cell.id)
    return tuple(cells)


def _check(spec: SweepSpec) -> None:
    matrix = spec.matrix
    if not matrix.models:
        raise UsageError("the matrix is empty: matrix.models names no model")
    for axis in ("scenarios", "seeds"):
        if not getattr(matrix, axis):
            raise UsageError(f"the matrix is empty: matrix.{axis} has no value; leave it out for the default")
    for dtype in matrix.dtypes:
        one_of("matrix.dtypes", dtype, (*_DTYPES, *_ALIASES))
    for engine in (*matrix.engines, *itertools.chain(*matrix.pairs)):
        one_of("matrix.engines", engine, ENGINE_NAMES)
    for cache in matrix.caches:
        one_of("matrix.caches", cache, tuple(itertools.chain(*_CACHES.values())))
    for scenario in matrix.scenarios:
        choose_scenarios(scenario)
    for length in matrix.lengths:
        parse_lengths(str(length))
    for name, prompt in spec.prompts.items():
        if not prompt:
            raise UsageError(f"prompts.{name} is empty; give a text or token ids")
    plan_of(spec, None, 0, spec.alpha)


def plan_of(spec: SweepSpec, lengths: str | None, seed: int, alpha: float) -> AuditPlan:
    """Return the plan of a cell, with the share of alpha that it has."""
    common = spec.audit
    return AuditPlan(
        mode=common.mode,  # type: ignore[arg-type]  # checked there
        span=common.span,
        layers=None if common.layers is None else parse_layers(common.layers),
        alpha=alpha,
        ladder=common.ladder,  # type: ignore[arg-type]  # checked there
        seed=seed,
        keep_traces=common.traces,
        lengths=None if lengths is None else parse_lengths(lengths),
    )


def _targets(spec: SweepSpec) -> Iterator[tuple[ModelSpec, str, str]]:
    """Yield each model with each engine that it is declared for, and its name there."""
    for model in spec.matrix.models:
        if isinstance(model, str):
            engine = find_engine(model)[0].name
            if not spec.matrix.engines or engine in spec.matrix.engines:
                yield ModelSpec(name=model), engine, model
            continue
        for engine in spec.matrix.engines or ENGINE_NAMES:
            place = getattr(model, engine)
            if place is not None:
                yield model, engine, place if engine == "hf" or place.startswith(engine) else f"{engine}:{place}"


def _audits(spec: SweepSpec) -> Iterator[SweepCell]:
    matrix = spec.matrix
    for model, engine, target in _targets(spec):
        axes = itertools.product(
            _or_default(_ALIASES.get(dtype, dtype) for dtype in matrix.dtypes if engine == "hf"),
            _or_default(matrix.attention if engine != "mlx" else ()),
            _or_default(matrix.caches),
            matrix.scenarios,
            _or_default(spec.prompts),
            _or_default(str(length) for length in matrix.lengths),
            matrix.seeds,
        )
        for dtype, attention, cache, scenario, prompt, lengths, seed in axes:
            yield _named(
                model,
                engine=engine,
                target=target,
                dtype=dtype,
                attention=attention,
                cache=cache,
                scenario=scenario,
                prompt=prompt,
                lengths=lengths,
                seed=seed,
                memory=_memory(model, target, spec.audit.ladder),
                why_not=_why_not(engine, attention, cache, scenario, lengths),
            )


def _or_default(values: Iterable[str]) -> list[str | None]:
    """Return the values of an axis; None, the default, where it has none."""
    return [*values] or [None]


def _pairs(spec: SweepSpec) -> Iterator[SweepCell]:
    for model in spec.matrix.models:
        for a, b in spec.matrix.pairs:
            places = {engine: target for each, engine, target in _targets_of_all(spec) if each.name == _name(model)}
            both = model if isinstance(model, ModelSpec) else ModelSpec(name=model)
            lacking = [engine for engine in (a, b) if engine not in places]
            for prompt in _or_default(spec.prompts):
                yield _named(
                    both,
                    engine=f"{a}/{b}",
                    target=places.get(a, ""),
                    versus=places.get(b, ""),
                    prompt=prompt,
                    memory=parse_memory(both.memory) if both.memory else None,
                    why_not=f"{both.name} is not declared for {lacking[0]}" if lacking else None,
                )


def _targets_of_all(spec: SweepSpec) -> Iterator[tuple[ModelSpec, str, str]]:
    return _targets(msgspec.structs.replace(spec, matrix=msgspec.structs.replace(spec.matrix, engines=())))


def _name(model: str | ModelSpec) -> str:
    return model if isinstance(model, str) else model.name


def _why_not(engine: str, attention: str | None, cache: str | None, scenario: str, lengths: str | None) -> str | None:
    if cache is not None and cache not in _CACHES[engine]:
        return f"{engine} has no cache {cache}"
    if attention is not None and (attention in ("on", "off")) != (engine == "llamacpp"):
        return f"{engine} has no attention {attention}"
    if lengths is not None and scenario != "decode":
        return "lengths are swept by plain decode alone"
    return None


def _named(model: ModelSpec, **facts: Any) -> SweepCell:
    said = {key: value for key, value in facts.items() if key not in ("memory", "why_not")}
    digest = hashlib.sha256(json.dumps([model.name, said], sort_keys=True).encode()).hexdigest()[:8]
    words = [
        Path(model.name).name,
        *(str(value) for key, value in said.items() if value and key not in ("target", "versus")),
    ]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-.")[:100]
    return SweepCell(id=f"{slug}-{digest}", model=model.name, cpus=model.cpus, gpus=model.gpus, **facts)


def _memory(model: ModelSpec, target: str, ladder: str) -> int | None:
    """Return about how many bytes an audit takes, from the size of its files; None if it cannot be told."""
    if model.memory is not None:
        return parse_memory(model.memory)
    place = Path(find_engine(target)[1] or "").expanduser()
    try:
        files = [place] if place.is_file() else [p for p in place.iterdir() if p.suffix in (".safetensors", ".bin")]
        weights = sum(file.stat().st_size for file in files)
    except OSError:
        return None
    return int(_BASE + _TIMES[ladder] * weights) if weights else None
