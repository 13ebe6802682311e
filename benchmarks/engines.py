"""Engines that others wrote, audited through the adapters of examples/engines: clean, with a stale slot, shifted.

The packages are not among kvdrift's requirements. Each is installed, without what it would bring along of torch, into a
folder of its own in kvdrift's cache folder, and runs in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support import say
from kvdrift.engines.hf.demo import cache_root
from kvdrift.errors import EngineUnavailable
from kvdrift.pipeline.audit import audit

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "engines"
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31], "q": [7, 1, 70, 22, 13, 14, 15, 60, 61, 62, 11, 3]}
LAYER, SLOT = 1, 3

Shift = Callable[[Any], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Case:
    """An engine that others wrote.

    Attributes:
        module: the adapter in examples/engines.
        packages: what is installed for it, none of it with its requirements; the first is the engine.
        stale: writes the value row of the slot before into slot `SLOT` of layer `LAYER`, in its kind of cache.
        shifted: turns queries and keys by one position more while the context is open.
        layer: what kvdrift calls the layer of attention number `LAYER`; feed-forward parts may be layers of their own.
    """

    module: str
    packages: tuple[str, ...]
    stale: Callable[[Any], None]
    shifted: Shift
    layer: int = LAYER


def run(options: argparse.Namespace) -> bool:
    """Audit each engine in a process of its own; a false alarm, a missed fault or a wrong address is a miss."""
    holds = True
    for name, case in CASES.items():
        folder = _installed(name, case.packages)
        path = os.pathsep.join([str(folder), str(EXAMPLES), *(p for p in sys.path if p)])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.engines", name],
            env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
            cwd=EXAMPLES.parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            say(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'it broke off'}")
            holds = False
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        say(f"{case.packages[0] if case.packages else name} ({found['seconds']:.0f} s): {found['text']}")
        holds &= found["holds"]
    return holds


def audited(name: str) -> dict[str, Any]:
    """Audit one engine clean, stale and shifted, and say whether each verdict and address is right."""
    case, began = CASES[name], time.perf_counter()
    module = importlib.import_module(case.module)
    text, holds = [], True
    for fault, wanted in (("clean", None), ("stale", f"layer {case.layer} / v_cache"), ("shifted", "layer 0 / q_rope")):
        engine = module.make()
        _plant(engine, case, fault)
        result = audit(engine, prompts=PROMPTS, span=2)
        place = None if result.first_failure is None else str(result.first_failure.place)
        holds &= place == wanted and (result.exit_code == 0) == (wanted is None)
        text.append(f"{fault}: {result.verdict}" + (f" at {place}" if place else ""))
    return {"holds": holds, "text": "; ".join(text), "seconds": time.perf_counter() - began}


def _plant(engine: Any, case: Case, fault: str) -> None:
    """Commit a fault in each decode step of an engine, and in no prefill."""
    honest = engine.step

    def step(tokens: Any, cache: Any, start: int) -> Any:
        if fault == "clean" or tokens.shape[1] > 1:
            return honest(tokens, cache, start)
        if fault == "stale":
            case.stale(cache)
            return honest(tokens, cache, start)
        with case.shifted(engine):
            return honest(tokens, cache, start)

    engine.step = step


# ----------------------------------------------------------------------------------------------- the faults, by engine


def _copy_row(rows: Any, axis: int) -> None:
    """Overwrite one slot of value rows by the slot before it."""
    first = rows.movedim(axis, 0)
    first[SLOT] = first[SLOT - 1].clone()


@contextmanager
def _rolled(holders: list[Any], *names: str) -> Iterator[None]:
    """Have tables of angles begin at the next position while the context is open."""
    kept = [(holder, name, getattr(holder, name)) for holder in holders for name in names]
    for holder, name, table in kept:
        setattr(holder, name, table.roll(-1, 0))
    try:
        yield
    finally:
        for holder, name, table in kept:
            setattr(holder, name, table)


@contextmanager
def _replaced(place: Any, name: str, function: Any) -> Iterator[None]:
    honest = getattr(place, name)
    setattr(place, name, lambda *args, **options: function(honest, *args, **options))
    try:
        yield
    finally:
        setattr(place, name, honest)


def _stale_x(cache: Any) -> None:
    _copy_row(cache.attn_intermediates[LAYER].cached_kv[1], 2)


def _shifted_x(engine: Any) -> AbstractContextManager[None]:
    """The last token alone: keys are turned when they are read, so that all of them one further on are right."""
    rotary = engine.model.attn_layers.rotary_pos_emb

    def shift(honest: Any, t: Any, **options: Any) -> Any:
        later = t.clone()
        later[..., -1] += 1
        return honest(later, **options)

    return _replaced(rotary, "forward", shift)


@contextmanager
def _shifted_lens(engine: Any) -> Iterator[None]:
    """The query alone, for the same reason: a decode step turns one row of queries, and all keys."""
    with ExitStack() as stack:
        for block in engine.model.blocks:

            def shift(honest: Any, x: Any, *args: Any, attn: Any = block.attn, **options: Any) -> Any:
                if x.shape[1] > 1:
                    return honest(x, *args, **options)
                with _rolled([attn], "rotary_cos", "rotary_sin"):
                    return honest(x, *args, **options)

            stack.enter_context(_replaced(block.attn, "apply_rotary", shift))
        yield


@contextmanager
def _shifted_keras(engine: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in engine.model["layers"]:
            rotary = layer._self_attention_layer.rotary_embedding_layer
            stack.enter_context(
                _replaced(rotary, "call", lambda honest, x, start_index=0: honest(x, start_index=start_index + 1))
            )
        yield


CASES = {
    "fixed cache": Case(
        "fixed_cache_engine",
        (),
        lambda cache: _copy_row(cache[LAYER].values, 2),
        lambda engine: _rolled([engine.model], "angles"),
    ),
    "litgpt": Case(
        "litgpt_engine",
        (
            "litgpt==0.5.13",
            "lightning==2.6.6",
            "lightning-utilities==0.15.3",
            "pytorch-lightning==2.6.6",
            "torchmetrics==1.9.0",
            "jsonargparse==4.53.0",
            "typeshed-client==2.15.0",
            "docstring-parser==0.18.0",
        ),
        lambda cache: _copy_row(cache[LAYER].v, 2),
        lambda engine: _rolled([engine.model], "cos", "sin"),
    ),
    "x-transformers": Case(
        "x_transformers_engine",
        (
            "x-transformers==2.31.10",
            "einops==0.8.2",
            "einx==0.4.3",
            "frozendict==2.5.1",
            "loguru==0.7.3",
            "torch-einops-utils==0.2.0",
        ),
        _stale_x,
        _shifted_x,
        layer=2,
    ),
    "keras-hub": Case(
        "keras_hub_engine",
        (
            "keras-hub==0.32.0",
            "keras==3.15.1",
            "absl-py==2.5.1",
            "h5py==3.16.0",
            "kagglehub==1.0.3",
            "kagglesdk==0.1.28",
            "namex==0.1.0",
            "optree==0.20.0",
            "sentencepiece==0.2.3",
        ),
        lambda cache: _copy_row(cache[:, LAYER, 1], 1),
        _shifted_keras,
    ),
    "TransformerLens": Case(
        "transformer_lens_engine",
        (
            "transformer-lens==3.9.0",
            "beartype==0.23.1",
            "better-abc==0.0.3",
            "datasets==5.2.0",
            "dill==0.4.1",
            "einops==0.8.2",
            "fancy-einsum==0.0.3",
            "jaxtyping==0.3.11",
            "multiprocess==0.70.19",
            "pandas==3.1.1",
            "python-dateutil==4.0.0",
            "pytz==2026.6",
            "sentencepiece==0.2.3",
            "six==1.17.0",
            "typeguard==4.6.1",
            "wadler-lindig==0.1.8",
            "wandb==0.31.0",
            "xxhash==4.1.0",
        ),
        lambda cache: _copy_row(cache.entries[LAYER].past_values, 1),
        _shifted_lens,
    ),
}


def _installed(name: str, packages: tuple[str, ...]) -> Path:
    """Return the folder with the packages of an engine; install them if they are not there."""
    folder = cache_root() / "engines" / name.replace(" ", "-")
    stamp = folder / ".complete"
    wanted = "\n".join(packages)
    if not packages or (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        return folder
    say(f"installing {packages[0]} into the cache folder")
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "install", "--no-deps", "--upgrade"]
    done = subprocess.run([*command, "--target", str(folder), *packages], check=False)
    if done.returncode:
        raise EngineUnavailable(f"pip could not install {packages[0]} for the benchmark (see above)")
    stamp.write_text(wanted, encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.stdout.write(json.dumps(audited(sys.argv[1])) + "\n")
