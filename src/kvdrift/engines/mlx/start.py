"""Opens a model of mlx-lm by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from kvdrift.engines.base import OpenEngine
from kvdrift.engines.encode import encoder
from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.progress import Progress


@contextmanager
def start(place: str | None, plan: AuditPlan, progress: Progress, *, cache: str = "default") -> Iterator[OpenEngine]:
    """Open the model that `place` names.

    Args:
        place: a directory or hub id that mlx-lm loads.
        plan: the layers to record.
        progress: hears what is being done.
        cache: which kind of cache takes the place of plain ones: default, batch, quantized, rotating or chunked.

    Raises:
        UsageError: no model is named, the cache is unknown, or the ladder is asked for by layer.
        EngineUnavailable: mlx, mlx-lm or the model is not to be had.
    """
    if place is None or not place.strip():
        raise UsageError("mlx: names no model; write mlx:PATH")
    if plan.ladder == "layer":
        raise UsageError("--ladder layer is for models in torch; leave it out, or use --ladder off")
    progress.say("starting mlx")
    try:
        import mlx.core  # noqa: F401
        import mlx_lm  # noqa: F401
    except ImportError as error:
        raise EngineUnavailable("auditing a model in mlx needs mlx and mlx-lm; pip install 'kvdrift[mlx]'") from error
    from kvdrift.engines.mlx.engine import MLXEngine, MLXModel

    progress.say(f"loading {place}")
    loaded, tokenizer = _load(place)
    model = MLXModel(loaded, cache=cache, name=place)
    with MLXEngine(model.model, name=model.name, cache=model.cache, layers=plan.layers) as engine:
        yield OpenEngine(engine, encoder(tokenizer))


def _load(place: str) -> tuple[Any, Any]:
    """Return the model that `place` names, and its tokenizer; None for a directory without one."""
    from mlx_lm.utils import load, load_model, load_tokenizer

    folder = Path(place).expanduser()
    try:
        if not folder.exists():
            return cast("tuple[Any, Any]", load(place))
        model, _ = load_model(folder)
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        raise EngineUnavailable(f"mlx-lm cannot load {place}: {type(error).__name__}: {said}") from error
    try:
        return model, load_tokenizer(folder)
    except Exception:  # noqa: BLE001 - prompts can still be given as token ids
        return model, None


__all__ = ["start"]
