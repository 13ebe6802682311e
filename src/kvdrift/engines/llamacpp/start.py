"""Opens a GGUF file in llama.cpp by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvdrift.engines.base import OpenEngine
from kvdrift.engines.llamacpp.engine import DEFAULT_BATCH, LlamaCppEngine
from kvdrift.errors import UsageError
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.progress import Progress


@contextmanager
def start(
    place: str | None,
    plan: AuditPlan,
    progress: Progress,
    *,
    kv_type: str = "f16",
    flash_attn: str = "on",
    threads: int | None = None,
    n_batch: int = DEFAULT_BATCH,
) -> Iterator[OpenEngine]:
    """Open the file that `place` names.

    Args:
        place: the path of a .gguf file.
        plan: the layers to record.
        progress: hears what is being done.
        kv_type: type of K and V in the cache.
        flash_attn: "on" or "off"; llama.cpp's own default is on.
        threads: threads of llama.cpp; None for all cores.
        n_batch: tokens that go through the graph at once.

    Raises:
        UsageError: no file is named, or an option does not fit.
        EngineUnavailable: llama-cpp-python or the file is not to be had, or the file is not a decoder.
    """
    if flash_attn not in ("on", "off"):
        raise UsageError(f"--flash-attn is {flash_attn!r}; use on or off")
    if place is None or not place.strip():
        raise UsageError("llamacpp: names no file; write llamacpp:FILE.gguf")
    progress.say("starting llama.cpp")
    with LlamaCppEngine(
        place, kv_type=kv_type, flash=flash_attn == "on", threads=threads, n_batch=n_batch, layers=plan.layers
    ) as engine:
        yield OpenEngine(engine, engine.encoder)


__all__ = ["start"]
