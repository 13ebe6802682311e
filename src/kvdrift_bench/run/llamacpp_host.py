"""A GGUF file in llama.cpp as what faults are planted into."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvdrift.capture.prompts import Encode
from kvdrift.engines.base import LiveEngine
from kvdrift.engines.hf.demo import find_gguf
from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.library import check_gguf, load_library, requantise
from kvdrift.errors import EngineUnavailable
from kvdrift_bench.planted.facts import FaultFacts, Tally
from kvdrift_bench.planted.llamacpp import Grounds, LlamaFault, LlamaTwin, clean_twins, corpus_for, survey
from kvdrift_bench.run.options import AS_THEY_ARE, EMBEDDED, LLAMACPP, TINY
from kvdrift_bench.run.records import Place
from kvdrift_bench.run.subjects import Planted

_LAYERS = 4  # of a tiny model: enough for a fault in one of them, with layers on both sides
_UNFUSED = ("f32", "f16", "bf16")  # types of V that attention reads without flash attention


def why_not_run(kv_type: str, flash: str) -> str | None:
    """Why llama.cpp has no such configuration, None if it has."""
    if flash == "off" and kv_type not in _UNFUSED:
        return f"llama.cpp keeps V in {kv_type} with flash attention only"
    return None


@dataclass(frozen=True, slots=True)
class LlamaHost:
    """A file in one configuration, under the name that results carry; see `kvdrift_bench.run.subjects.Host`.

    One thread, so that results do not depend on how many the machine has. `folder` is for the file at the clean
    configurations.
    """

    name: str
    path: Path
    kv_type: str
    flash: bool
    folder: Path
    dtype: str
    grounds: Grounds
    attention: str = "llama.cpp"

    def faults(self) -> Sequence[LlamaFault]:
        return corpus_for(self.grounds.n_layers)

    def twins(self) -> Sequence[LlamaTwin]:
        return clean_twins()

    def why_not(self, planted: Planted) -> str | None:
        assert isinstance(planted, LlamaFault | LlamaTwin)
        return planted.applies(self.grounds)

    def places(self, fault: FaultFacts) -> list[Place]:
        return [(layer, str(site)) for layer, site in fault.places(self.grounds)]

    @contextmanager
    def run(self, planted: Planted | None) -> Iterator[tuple[LiveEngine, Tally]]:
        assert planted is None or isinstance(planted, LlamaFault | LlamaTwin)
        tally = Tally()
        fault = None if planted is None else planted.plant(tally)
        with _engine(self.path, self.kv_type, self.flash, self.folder) as engine, engine.planted(fault):
            yield engine, tally

    def encoder(self, engine: LiveEngine) -> Encode | None:
        assert isinstance(engine, LlamaCppEngine)
        return engine.encoder


def open_llamacpp(spec: str, kv_type: str, flash: str, folder: Path, *, weights: str = AS_THEY_ARE) -> LlamaHost:
    """Open what `--model` names: `default`, `tiny:ARCHITECTURE`, or a GGUF file.

    `weights` is the type that its matrices are written again in. What is written goes into `folder`, which several
    processes may share.

    Raises:
        UsageError: the file is not a GGUF file, or there is no such tiny model or type.
        EngineUnavailable: llama.cpp, the file or what writes it is not to be had.
        CaptureError: llama.cpp cannot run the file in this configuration.
    """
    if spec.startswith(TINY):
        path, name = _write_tiny(spec.removeprefix(TINY), folder), spec
    else:
        path = find_gguf() if spec == EMBEDDED else Path(spec.removeprefix(LLAMACPP))
        name = path.name
    if weights != AS_THEY_ARE:
        path = _write_again(path, folder, weights)
    with _engine(path, kv_type, flash == "on", folder) as engine:
        return LlamaHost(name, path, kv_type, flash == "on", folder, engine.info.dtype, survey(engine))


def _engine(path: Path, kv_type: str, flash: bool, folder: Path) -> LlamaCppEngine:
    return LlamaCppEngine(path, kv_type=kv_type, flash=flash, threads=1, folder=folder)


def _write_again(path: Path, folder: Path, weights: str) -> Path:
    check_gguf(path)
    # Two models may have one name, in two places.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    target = folder / f"{path.stem}-{place}-{weights}.gguf"
    if not target.exists():
        requantise(load_library(), path, target, weights, threads=1)
    return target


def _write_tiny(kind: str, folder: Path) -> Path:
    try:
        from kvdrift_bench.models.tiny_gguf import write_tiny_gguf
    except ModuleNotFoundError as error:
        raise EngineUnavailable(
            f"tiny GGUF files are written with the package {error.name}; pip install gguf"
        ) from error
    path = folder / f"{kind}.gguf"
    if not path.exists():
        write_tiny_gguf(path.with_suffix(f".{os.getpid()}.partial"), kind, n_layers=_LAYERS).rename(path)
    return path
