"""One release, audited: `python -m kvdrift_bench.run.history_child TASK RESULT`, with the release in front of the path.

TASK is a JSON file with a `HistoryTask`, RESULT the file that a `HistoryAudit` is written to.
"""

from __future__ import annotations

import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import msgspec

SEED = 0
# Longer than the windows of the models, and of two lengths.
PROMPTS = {
    "p": [15, 19, 27, 13, 44, 22, 18, 61, 30, 77, 12],
    "q": [22, 18, 61, 30, 77, 12, 64, 33, 42, 81, 29, 98, 17],
}
_PEAKED = re.compile(r"q_proj|k_proj|qkv|wq|wk")


class HistoryTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is audited of a release that lies unpacked in `folder`.

    Attributes:
        model: a type of the zoo, for transformers.
        config: the configuration of a model, for mlx-lm.
    """

    package: Literal["mlx-lm", "transformers"]
    folder: str
    version: str
    model: str
    config: dict[str, Any]
    scenario: str
    cache: str
    padding: Literal["left", "right"]
    step: int | None


class HistoryAudit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What came of it; `verdict` is None where the release broke off, and `said` then what it said."""

    verdict: str | None = None
    first_failure: str | None = None
    cause: str | None = None
    said: str | None = None
    seconds: float = 0.0


def audit_release(task: HistoryTask) -> HistoryAudit:
    """Audit a tiny model of the release that this process imports.

    Raises:
        ValueError: it imports another release than the task names.
    """
    module = import_module(task.package.replace("-", "_"))
    if module.__version__ != task.version or not Path(str(module.__file__)).is_relative_to(task.folder):
        raise ValueError(
            f"{task.package} {module.__version__} of {module.__file__} was imported, and not {task.version}"
        )
    from kvdrift.pipeline.audit import audit

    began = time.monotonic()
    try:
        model = _of_mlx(task) if task.package == "mlx-lm" else _of_transformers(task)
        found = audit(model, prompts=PROMPTS, span=2, mode="as_designed", scenarios=[task.scenario])
    except Exception as error:  # noqa: BLE001 - a release may break in whatever way
        line = next(iter(str(error).splitlines()), "")
        return HistoryAudit(said=f"{type(error).__name__}: {line}", seconds=time.monotonic() - began)
    failure, diagnosis = found.first_failure, found.diagnosis
    return HistoryAudit(
        verdict=str(found.verdict),
        first_failure=None if failure is None else str(failure),
        cause=None if diagnosis is None else str(diagnosis.cause),
        seconds=time.monotonic() - began,
    )


def _of_mlx(task: HistoryTask) -> Any:
    import mlx.core as mx

    from kvdrift.engines.mlx.engine import MLXModel
    from kvdrift.engines.mlx.routes import Batching

    mx.set_default_device(mx.cpu)
    return MLXModel(_tiny(task.config), cache=task.cache, batching=Batching(task.padding, task.step))


def _of_transformers(task: HistoryTask) -> Any:
    from kvdrift.zoo.build import build

    return build(task.model)


def _tiny(config: dict[str, Any]) -> Any:
    """A float32 model with random weights that are large enough for every part of it to matter."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    module = import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(SEED)  # before the model, which draws its weights as well
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = []
    for name, value in tree_flatten(model.parameters()):
        if not mx.issubdtype(value.dtype, mx.floating):
            continue
        values = value.astype(mx.float32)
        if values.ndim < 2:
            values = values + 0.2 * mx.random.normal(values.shape)
        elif not name.endswith("A_log"):
            spread = float(mx.std(values))
            values = values + 0.1 * mx.random.normal(values.shape) if spread == 0.0 else values
            values = values * (0.25 / spread) if 0.0 < spread < 0.2 else values
            values = values * 1.5 if _PEAKED.search(name) else values
        weights.append((name, values))
    model.load_weights(weights, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model


def main(task: str, result: str) -> None:
    """Read the task, audit, write what came of it."""
    found = audit_release(msgspec.json.decode(Path(task).read_bytes(), type=HistoryTask))
    Path(result).write_bytes(msgspec.json.encode(found))


if __name__ == "__main__":
    main(*sys.argv[1:])


__all__ = ["PROMPTS", "SEED", "HistoryAudit", "HistoryTask", "audit_release", "main"]
