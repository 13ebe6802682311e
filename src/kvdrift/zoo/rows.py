"""One row of the zoo: a type is built and audited, and what came of it is plain data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from kvdrift.errors import EngineUnavailable, KvdriftError
from kvdrift.report.schema.others import ZooRowView
from kvdrift.zoo.build import build

AUDIT_TYPE = "kvdrift.zoo.rows:audit_type"
# Longer than the window of a tiny model, so that a row leaves it. No id of a special token: some models number the
# positions of a text without its padding tokens, which often are 1 or 0.
PROMPTS = {"long": [15, 19, 27, 13, 44, 22, 18, 61, 30, 77, 12], "short": [64, 33, 42, 81, 29, 98, 17, 56, 35]}
SPAN = 2


def audit_type(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Build and audit the type that a payload names, with its scenarios; return a `ZooRowView` as plain data.

    No exception leaves it: one architecture that breaks is that architecture's row.
    """
    began = time.monotonic()
    kind, scenarios, engine = payload["type"], payload["scenarios"], payload.get("engine", "hf")
    try:
        row = _row(kind, scenarios) if engine == "hf" else _row_of_mlx(kind, scenarios)
    except (EngineUnavailable, ImportError) as error:  # what cannot be run here: another package, no cache
        row = without_verdict(kind, scenarios, "NOT_APPLICABLE", _line(error), engine)
    except SystemExit:  # olmo of mlx-lm ends the process where a package is missing
        reason = "its module ends the process when it is imported, for want of another package"
        row = without_verdict(kind, scenarios, "NOT_APPLICABLE", reason, engine)
    except Exception as error:  # noqa: BLE001  # whatever an architecture raises, it is told of that one
        said = _line(error)
        said = said if isinstance(error, KvdriftError) else f"{type(error).__name__}: {said}"
        needs_metal = engine == "mlx" and "[metal_kernel] No Metal" in said
        row = without_verdict(kind, scenarios, "NOT_APPLICABLE" if needs_metal else "ERROR", said, engine)
    done: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(row, seconds=round(time.monotonic() - began, 1)))
    return done


def without_verdict(
    kind: str, scenarios: Sequence[str], state: str, reason: str | None, engine: str = "hf"
) -> ZooRowView:
    """Return the row of a type that was not audited."""
    return ZooRowView(type=kind, scenarios=list(scenarios), state=state, reason=reason, **made_with(engine))


def made_with(engine: str) -> dict[str, Any]:
    """Return what a row says of its engine: rows of other versions are other rows."""
    of_mlx = version("mlx-lm") if engine == "mlx" else None
    return {"engine": engine, "transformers": version("transformers"), "mlx_lm": of_mlx}


def _row(kind: str, scenarios: Sequence[str]) -> ZooRowView:
    model = build(kind)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return _audited(kind, scenarios, model, "hf", n_parameters, _cache_of(model))


def _row_of_mlx(kind: str, scenarios: Sequence[str]) -> ZooRowView:
    from mlx.utils import tree_flatten

    from kvdrift.engines.mlx.caches import flat, new_cache
    from kvdrift.engines.mlx.engine import MLXModel
    from kvdrift.zoo.build_mlx import build_mlx

    model = build_mlx(kind)
    n_parameters = sum(int(value.size) for _, value in tree_flatten(model.parameters()))
    caches = dict.fromkeys(type(each).__name__ for each in flat(new_cache(model, "default")))
    return _audited(kind, scenarios, MLXModel(model, name=kind), "mlx", n_parameters, ", ".join(caches))


def _audited(
    kind: str, scenarios: Sequence[str], model: Any, engine: str, n_parameters: int, cache: str | None
) -> ZooRowView:
    from kvdrift.pipeline.audit import audit

    found = audit(model, prompts=PROMPTS, span=SPAN, scenarios=["decode", *scenarios])
    rows = {row["name"]: row for row in found.view["scenarios"]}
    decode = rows.pop("decode")
    return ZooRowView(
        type=kind,
        scenarios=list(scenarios),
        state=decode["verdict"],
        parameters=n_parameters,
        cache=cache,
        verdicts={name: row["verdict"] for name, row in rows.items() if row["applicable"]},
        first_failure=decode["first_failure"],
        excess=decode["worst_excess"],
        reason=next(iter(decode["reasons"]), None),
        **made_with(engine),
    )


def _cache_of(model: Any) -> str | None:
    import torch

    from kvdrift.engines.hf.kinds import returned_cache

    with torch.no_grad():
        cache = returned_cache(model(torch.tensor([[5, 9]]), use_cache=True))
    return None if cache is None else type(cache).__name__


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
