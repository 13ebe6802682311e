"""Opens a model of transformers by its name, or the engine that a user's own function makes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from kvdrift.engines.base import CanBeOpened, OpenEngine
from kvdrift.engines.encode import encoder
from kvdrift.engines.function import call_function, check_tokenizer, names_function
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
    made = call_function(place, _import_quietly) if place is not None and names_function(place) else None
    if made is not None and isinstance(made[0], CanBeOpened):
        given = {"--dtype": dtype, "--attn": attn, "--device": device, "--cache": None if cache == "dynamic" else cache}
        _refuse_options(str(place), given)
        check_tokenizer(str(place), made[1])
        progress.say(f"opening {place}")
        with made[0].opened(plan) as opened:
            yield OpenEngine(opened.engine, encoder(made[1]) or opened.encode)
        return
    progress.say("starting torch")
    _require_torch()
    from kvdrift.engines.hf.engine import HFEngine
    from kvdrift.engines.hf.load import load_model

    loaded = load_model(place, dtype=dtype, attention=attn, device=device, progress=progress.say, made=made)
    progress.say(f"reading the roles of {loaded.name}")
    by_layer = plan.ladder == "layer"
    with HFEngine(loaded.model, name=loaded.name, cache=cache, layers=plan.layers, by_layer=by_layer) as engine:
        yield OpenEngine(engine, encoder(loaded.tokenizer))


def _refuse_options(place: str, given: Mapping[str, str | None]) -> None:
    """Refuse options of models of transformers for an engine of a user's own, which needs neither them nor torch.

    Raises:
        UsageError: one was given.
    """
    if names := [name for name, value in given.items() if value is not None]:
        raise UsageError(
            f"{names[0]} is for models of transformers, and {place} is an engine of its own, which says itself how it "
            "runs and makes its caches; leave it out"
        )


def _import_quietly() -> None:
    """Import what models of transformers need, if the user's own module imports transformers: what its optional parts
    log when the first model is made belongs to none of the user's lines."""
    if "transformers" in sys.modules:
        with quiet_imports(), suppress(ImportError):
            importlib.import_module("transformers.modeling_utils")


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
