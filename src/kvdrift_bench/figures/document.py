"""Where the figures go: between the markers of a document, with its drawings beside it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvdrift.errors import UsageError
from kvdrift_bench.figures.curves import DtypeCurves
from kvdrift_bench.figures.markers import Markers
from kvdrift_bench.figures.roc_figure import draw_curves
from kvdrift_bench.run.options import EngineChoice

_MARKERS = Markers.of("kvdrift-bench faults")
BEGIN, END = _MARKERS.begin, _MARKERS.end
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


def write_between_markers(path: Path, text: str) -> None:
    """Put `text` between the markers of the document, at its end if it has none yet.

    Raises:
        UsageError: the document has one marker without the other, or cannot be written.
    """
    _MARKERS.write(path, text)


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
