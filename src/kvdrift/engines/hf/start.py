"""Opens a model of transformers by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvdrift.engines.base import CanBeOpened, OpenEngine
from kvdrift.engines.hf.quiet import quiet_imports
from kvdrift.engines.hf.versions import require_transformers
from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.progress import Progress


@contextmanager
def start(
    place: str | None,
    plan: AuditPlan,
    progress: Progress,
    *,
    dtype: str | None = None,
    attn: str | None = None,
    cache: str = "dynamic",
    device: str | None = None,
) -> Iterator[OpenEngine]:
    """Load the model that `place` names, the embedded one for None, and open it.

    Args:
        place: a directory, a hub id, a .gguf file or package.module:function.
        plan: the layers to record, and how the upper rungs are to run.
        progress: hears what is being done.
        dtype: the dtype to run in; None for the model's own.
        attn: the attention implementation of transformers; None for the model's own.
        cache: the kind of cache.
        device: where to run; None for where the model loads.

    Raises:
        EngineUnavailable: torch, transformers or the model is not to be had, or it has no decode step to audit.
        UsageError: an option does not fit the model.
        CaptureError: the weights are not finite, or the model failed in its first call.
    """
    progress.say("starting torch")
    _require_torch()
    from kvdrift.engines.encode import encoder
    from kvdrift.engines.hf.engine import HFEngine
    from kvdrift.engines.hf.load import load_model

    loaded = load_model(place, dtype=dtype, attention=attn, device=device, progress=progress.say)
    progress.say(f"reading the roles of {loaded.name}")
    if isinstance(loaded.model, CanBeOpened):
        if cache != "dynamic":
            raise UsageError(f"--cache is for models of transformers, and {loaded.name} makes caches of its own")
        with loaded.model.opened(plan) as opened:
            yield OpenEngine(opened.engine, encoder(loaded.tokenizer) or opened.encode)
        return
    by_layer = plan.ladder == "layer"
    with HFEngine(loaded.model, name=loaded.name, cache=cache, layers=plan.layers, by_layer=by_layer) as engine:
        yield OpenEngine(engine, encoder(loaded.tokenizer))


def _require_torch() -> None:
    try:
        import torch  # noqa: F401

        with quiet_imports():
            import transformers.modeling_utils
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise EngineUnavailable(f"auditing a model needs {error.name!r}; pip install 'kvdrift[hf]'") from error
    require_transformers(transformers.__version__)


__all__ = ["start"]
