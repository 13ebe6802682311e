"""One real report of each verdict, of a tiny model: what the gallery of the documentation shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kvdrift
from kvdrift.errors import KvdriftError, UsageError
from kvdrift.report.run_directory import write_file
from kvdrift.vocabulary.plan import LadderChoice
from kvdrift_bench.models.tiny import build_tiny
from kvdrift_bench.planted.torch import corpus_for

_LAYERS = 12
_PROMPTS = {"p": [5, 9, 17, 3, 88, 61, 12, 40, 7, 21, 33], "q": [101, 4, 77, 50, 6, 13]}


@dataclass(frozen=True, slots=True)
class Picture:
    """A report of the gallery: the verdict that it must have, and how it comes about."""

    verdict: str
    dtype: str
    attention: str = "sdpa"
    fault: str | None = None
    ladder: LadderChoice = "model"

    @property
    def name(self) -> str:
        """The name of the file, without its ending."""
        return self.verdict.lower()


PICTURES = (
    Picture("EXACT", "bfloat16", "eager"),
    Picture("STRUCTURAL_DRIFT", "float32"),
    Picture("MISMATCH", "bfloat16", fault="slot_stale"),
    Picture("INCONCLUSIVE", "float32", ladder="off"),
)


def write_gallery(folder: Path, names: tuple[str, ...] = ()) -> Iterator[Path]:
    """Write a report of each verdict, or of those named, as a page into `folder`, and yield its path.

    Raises:
        UsageError: `folder` cannot be written.
        KvdriftError: a report has another verdict than it is to show.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {folder}: {error.strerror}; name another directory") from error
    for picture in PICTURES:
        if names and picture.name not in names:
            continue
        model: Any = build_tiny(
            "llama",
            dtype=getattr(torch, picture.dtype),
            attention=picture.attention,
            lively=picture.fault is not None,
            num_hidden_layers=_LAYERS,
        )
        planting: AbstractContextManager[Any] = nullcontext()
        if picture.fault is not None:
            planting = next(f for f in corpus_for(_LAYERS) if f.name == picture.fault).plant(model)
        with planting:
            audit = kvdrift.audit(model, prompts=_PROMPTS, ladder=picture.ladder)
        if str(audit.verdict) != picture.verdict:
            raise KvdriftError(f"the picture of {picture.verdict} came out as {audit.verdict}")
        path = folder / f"{picture.name}.html"
        write_file(path, audit.to_html(), "--out")
        yield path
