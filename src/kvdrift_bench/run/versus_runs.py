"""Pairs of engines, one of which has a fault in one of its passes or in both, and what kvdrift says of each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kvdrift.versus.compare import EngineComparison, compare_engines
from kvdrift_bench.models.tiny import lively_model

Where = Literal["prefill", "decode", "both"]
PASSES: tuple[Where, ...] = ("prefill", "decode", "both")
# The module whose result is changed, and the place at which that shows first.
MODULES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.down_proj": "mlp_out",
    "lm_head": "logits",
}
KINDS = ("factor", "element", "noise")
LAYER = 1
_MODELS = ("llama", "qwen3", "mistral")
_CLEAN = (("float32", "sdpa"), ("float32", "eager"), ("bfloat16", "sdpa"), ("bfloat16", "eager"))


@dataclass(frozen=True, slots=True)
class VersusRun:
    """One pair: what was planted (nothing for a clean pair), and what was said."""

    module: str
    side: str
    where: str
    kind: str
    models: str
    verdict: str
    guilty: str | None
    guilty_pass: str | None
    place: str | None
    right_side: bool
    right_place: bool


def planted_runs(*, n: int, size: float = 1e-3, seed: int = 0) -> Iterator[VersusRun]:
    """Plant `n` faults, over modules, sides, passes and kinds in turn, and compare with an engine that has none."""
    cases = [(m, s, w) for w in PASSES for s in "AB" for m in MODULES]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(cases))
    for number in range(n):
        module, side, where = cases[order[number % len(cases)]]
        kind = KINDS[number % len(KINDS)]
        yield _planted(module, side, where, kind, size, rng)


def clean_runs(*, n: int, seed: int = 0) -> Iterator[VersusRun]:
    """Compare `n` pairs of one model in other dtypes, attention implementations and on other prompts."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        one, two = _CLEAN[number % len(_CLEAN)], _CLEAN[(number // len(_CLEAN)) % len(_CLEAN)]
        name = _MODELS[number % len(_MODELS)]
        # Weights of one dtype, whatever the engine computes in: rounded ones would be other weights.
        a, b = (_model(name, dtype, attention, coarse="bfloat16") for dtype, attention in (one, two))
        found = compare_engines(a, b, prompts=_prompts(rng))
        yield _run("none", "-", "-", "-", f"{name}: {'/'.join(one)} and {'/'.join(two)}", found, None, None)


def _planted(module: str, side: str, where: Where, kind: str, size: float, rng: np.random.Generator) -> VersusRun:
    bad, good = _model("llama", "float32", "sdpa"), _model("llama", "float32", "sdpa")
    target = bad.lm_head if module == "lm_head" else bad.model.layers[LAYER].get_submodule(module)
    with _planted_in(target, where, kind, size):
        pair = (bad, good) if side == "A" else (good, bad)
        found = compare_engines(*pair, prompts=_prompts(rng))
    place = MODULES[module] if module == "lm_head" else f"layer {LAYER} / {MODULES[module]}"
    return _run(module, side, where, kind, "llama", found, side, place)


@contextmanager
def _planted_in(module: nn.Module, where: Where, kind: str, size: float) -> Iterator[None]:
    """Change the result of a module, in calls of several tokens, of one, or in all."""
    wrong: dict[str, Callable[[Tensor], Tensor]] = {
        "factor": lambda y: y * (1.0 + size),
        "element": lambda y: torch.cat([y[..., :1] + size * y.norm(dim=-1, keepdim=True), y[..., 1:]], -1),
        "noise": lambda y: y + size * y.norm(dim=-1, keepdim=True) * _direction(y),
    }

    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        several = inputs[0].shape[1] > 1
        if where == "both" or (where == "prefill") == several:
            return wrong[kind](output)
        return None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _direction(y: Tensor) -> Tensor:
    values = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    unit: Tensor = values / values.norm()
    return unit.to(y.dtype)


def _model(name: str, dtype: str, attention: str, *, coarse: str | None = None) -> Any:
    # Built in its dtype: a cast of the whole model would round the frequencies of RoPE, and make another function.
    model = lively_model(name, getattr(torch, dtype), attention)
    if coarse is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, coarse)))
    return model


def _prompts(rng: np.random.Generator) -> dict[str, list[int]]:
    return {f"p{i}": [int(t) for t in rng.integers(3, 90, size=int(rng.integers(6, 20)))] for i in range(2)}


def _run(
    module: str,
    side: str,
    where: str,
    kind: str,
    models: str,
    found: EngineComparison,
    guilty: str | None,
    place: str | None,
) -> VersusRun:
    first = found.decision.first
    at = None if first is None else str(first.place)
    return VersusRun(
        module=module,
        side=side,
        where=where,
        kind=kind,
        models=models,
        verdict=str(found.verdict),
        guilty=found.guilty,
        guilty_pass=found.decision.guilty_pass,
        place=at,
        right_side=found.guilty == guilty,
        right_place=at == place,
    )


def table(runs: list[VersusRun]) -> str:
    """Return sides and places by module and pass, as Markdown."""
    lines = ["| fault in | pass | guilty side right | its pass right | address right |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[VersusRun]] = {}
    for run in runs:
        groups.setdefault((run.module, run.where), []).append(run)
    for (module, where), found in sorted(groups.items()):
        passes = sum(run.guilty_pass == (None if where == "both" else where) for run in found)
        lines.append(
            f"| `{module}` | {where} | {sum(run.right_side for run in found)} of {len(found)} | "
            f"{passes} of {len(found)} | {sum(run.right_place for run in found)} of {len(found)} |"
        )
    return "\n".join(lines) + "\n"
