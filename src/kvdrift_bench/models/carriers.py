"""Which tiny model carries which planted fault: the first architecture that can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kvdrift.errors import UsageError
from kvdrift_bench.models.architectures import ARCHITECTURES
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.planted.torch import CleanTwin, Fault

N_LAYERS = 3
PROMPT = [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]
PROMPTS = {"p": PROMPT}
SPAN = 3

CARRIERS = ("llama", "gemma2", "gpt2", "bloom", "qwen3", "mixtral", "gpt_oss", "phi3", "mamba2", "gemma3n")

# Rotary tables that the configuration calls dependent on the length, and that are one table: a clean model crosses the
# switch with rounding alone, which no model with two tables does.
_ONE_TABLE = {
    **ARCHITECTURES["phi3_longrope"][1]["rope_parameters"],
    "long_factor": ARCHITECTURES["phi3_longrope"][1]["rope_parameters"]["short_factor"],
}
# Scenarios that apply to no carrier as it is: the architecture and what is changed in it. A model of more than 512
# positions is audited behind 300 tokens and not at its last position.
_FOR_SCENARIO: dict[str, tuple[str, dict[str, Any]]] = {
    "long_context": ("llama", {"max_position_embeddings": 1024}),
    "rope_switch": ("phi3_longrope", {"rope_parameters": _ONE_TABLE}),
}


@cache
def lively(architecture: str, dtype: str, scenario: str | None = None) -> Any:
    """Return a tiny model in which nothing is zero or one by initialisation; it is shared by all who ask for it.

    `scenario` asks for the variant in which that scenario applies, if it needs one.
    """
    _, options = _FOR_SCENARIO.get(scenario or "", (architecture, {}))
    return lively_model(architecture, getattr(torch, dtype), **options)


def carrier_of(planted: Fault | CleanTwin, dtype: str = "float32") -> tuple[str, Any]:
    """Return the name of the first architecture that can carry it, with the scenario if it is a variant made for
    that, and its tiny model.

    Raises:
        UsageError: none of them can.
    """
    scenario = planted.needs if isinstance(planted, Fault) and planted.needs in _FOR_SCENARIO else None
    reasons = {}
    for architecture in CARRIERS if scenario is None else (_FOR_SCENARIO[scenario][0],):
        model = lively(architecture, dtype, scenario)
        reasons[architecture] = planted.applies(model)
        if reasons[architecture] is None:
            return architecture if scenario is None else f"{architecture} for {scenario}", model
    raise UsageError(f"no tiny model can carry {planted.name}: {reasons}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread while the context is open: on tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
