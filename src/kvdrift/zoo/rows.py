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
    kind, scenarios = payload["type"], payload["scenarios"]
    try:
        row = _row(kind, scenarios)
    except (EngineUnavailable, ImportError) as error:  # what cannot be run here: another package, no cache
        row = without_verdict(kind, scenarios, "NOT_APPLICABLE", _line(error))
    except Exception as error:  # noqa: BLE001  # whatever an architecture raises, it is told of that one
        said = _line(error)
        said = said if isinstance(error, KvdriftError) else f"{type(error).__name__}: {said}"
        row = without_verdict(kind, scenarios, "ERROR", said)
    done: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(row, seconds=round(time.monotonic() - began, 1)))
    return done


def without_verdict(kind: str, scenarios: Sequence[str], state: str, reason: str | None) -> ZooRowView:
    """Return the row of a type that was not audited."""
    return ZooRowView(
        type=kind, scenarios=list(scenarios), transformers=version("transformers"), state=state, reason=reason
    )


def _row(kind: str, scenarios: Sequence[str]) -> ZooRowView:
    from kvdrift.pipeline.audit import audit

    model = build(kind)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    found = audit(model, prompts=PROMPTS, span=SPAN, scenarios=["decode", *scenarios])
    rows = {row["name"]: row for row in found.view["scenarios"]}
    decode = rows.pop("decode")
    return ZooRowView(
        type=kind,
        scenarios=list(scenarios),
        transformers=version("transformers"),
        state=decode["verdict"],
        parameters=n_parameters,
        cache=_cache_of(model),
        verdicts={name: row["verdict"] for name, row in rows.items() if row["applicable"]},
        first_failure=decode["first_failure"],
        excess=decode["worst_excess"],
        reason=next(iter(decode["reasons"]), None),
    )


def _cache_of(model: Any) -> str | None:
    import torch

    with torch.no_grad():
        cache = getattr(model(torch.tensor([[5, 9]]), use_cache=True), "past_key_values", None)
    return None if cache is None else type(cache).__name__


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
