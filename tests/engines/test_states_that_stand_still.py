"""A recurrent state that decode steps do not advance is named, where a prefill shows its own state at its end alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from mlx_lm.models.cache import ArraysCache

import kvdrift
from kvdrift.engines.mlx.engine import MLXModel
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.zoo.build import build
from kvdrift.zoo.build_mlx import build_mlx

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31, 12, 4], "q": [7, 1, 70, 22, 13, 14, 15, 60, 61, 62, 11, 3]}


@contextmanager
def frozen_in_mlx(index: int) -> Iterator[Any]:
    """A Mamba-2 of mlx-lm whose layer 1 puts one of its two arrays back after a step."""
    model = build_mlx("mamba2")
    mixer = model.backbone.layers[1].mixer
    kind = type(mixer)

    def call(self: Any, hidden: Any, mask: Any = None, cache: ArraysCache | None = None) -> Any:
        kept = None if cache is None else cache[index]
        out = kind.__call__(self, hidden, mask, cache)
        if cache is not None and kept is not None and hidden.shape[1] == 1:
            cache[index] = kept
        return out

    mixer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    yield MLXModel(model)
    mixer.__class__ = kind


@contextmanager
def frozen_in_torch(name: str) -> Iterator[Any]:
    """A Qwen3-Next of transformers whose first linear layer puts its state back after a step."""
    model = build("qwen3_next")
    layer = next(i for i, part in enumerate(model.model.layers) if hasattr(part, "linear_attn"))
    kept: list[tuple[Any, Any]] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs["cache_params"]
        held = [] if cache is None else list((getattr(cache.layers[layer], name) or {}).values())
        kept[:] = [(state, state.clone()) for state in held if kwargs["hidden_states"].shape[1] == 1]

    def after(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        for state, was in kept:
            state.copy_(was)

    module = model.model.layers[layer].linear_attn
    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(module.register_forward_hook(after, with_kwargs=True))
    yield model
    for handle in handles:
        handle.remove()


FAULTS = [
    (frozen_in_mlx, 0, "conv_state_stale"),
    (frozen_in_mlx, 1, "ssm_state_stale"),
    (frozen_in_torch, "conv_states", "conv_state_stale"),
    (frozen_in_torch, "recurrent_states", "ssm_state_stale"),
]


@pytest.mark.parametrize(("faulty", "which", "cause"), FAULTS)
def test_a_state_that_no_step_advances_is_named(faulty: Any, which: Any, cause: str) -> None:
    with faulty(which) as model:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=4, mode="as_designed")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.position == len(PROMPTS["p"]) + 1, "the first step still reads what prefill left"
    assert audit.diagnosis is not None
    assert str(audit.diagnosis.cause) == cause, audit.diagnosis


@pytest.mark.parametrize("kind", ["mamba2", "mamba"])  # a matrix a head, and one for all of them
def test_states_of_mlx_are_recorded_and_pass(kind: str) -> None:
    audit = kvdrift.audit(MLXModel(build_mlx(kind)), prompts=PROMPTS, span=4, mode="as_designed")
    info = audit.suite.judged.measured.info

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    assert {str(site) for site in info.sites["1"]} >= {"conv_state", "ssm_state"}
    rows = audit.suite.judged.measured.table.select("as_designed", info.dtype)
    compared = {str(place.site) for place in rows.places}
    assert compared >= {"conv_state", "ssm_state"}, "compared behind the last token, where both passes have one"
