"""Where the figures go: between the markers of a document, drawings beside it, and JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvdrift.errors import UsageError
from kvdrift_bench.figures.curves import DtypeCurves
from kvdrift_bench.figures.markers import Markers
from kvdrift_bench.figures.roc_figure import draw_curves
from kvdrift_bench.run.options import EngineChoice

FAULTS = Markers.of("kvdrift-bench faults")
SCENARIOS = Markers.of("kvdrift-bench scenarios")
KERNELS = Markers.of("kvdrift-bench kernels")
COMPARE = Markers.of("kvdrift-bench compare")
LOGPROBS = Markers.of("kvdrift-bench logprobs")
GATE = Markers.of("kvdrift-bench gate")
PROMISES = Markers.of("kvdrift-bench promises")
SERVERS = Markers.of("kvdrift-bench servers")

_PACKAGES: dict[EngineChoice, tuple[str, ...]] = {
    "hf": ("kvdrift", "torch", "transformers", "numpy"),
    "llamacpp": ("kvdrift", "llama-cpp-python", "numpy"),
}


def machine_facts(engine: EngineChoice = "hf") -> dict[str, str]:
    """Return what the figures may depend on: cores and versions; nothing that names this machine."""
    facts = {
        "cores": str(os.cpu_count() or "unknown"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in _PACKAGES[engine]:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "unknown"
    return facts


def write_json(path: Path, command: str, facts: Mapping[str, str], figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, with the command that gives them and what they may depend on.

    Raises:
        UsageError: the file cannot be written.
    """
    whole = {"command": command, "machine": facts, **figures}
    try:
        path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another file") from error


def write_drawings(document: Path, curves: Sequence[DtypeCurves]) -> dict[str, str]:
    """Write the ROC curves of each dtype beside `document` and return their file names by dtype.

    Raises:
        UsageError: a file cannot be written.
    """
    names = {}
    for item in curves:
        path = document.with_name(f"{document.stem}-roc-{item.dtype}.svg")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(draw_curves(item), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; name another file with --markdown") from error
        names[item.dtype] = path.name
    return names
