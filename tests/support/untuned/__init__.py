"""Faults of decode steps in the style of bugs that engines had, to count how many of them a diagnosis explains.

The catalogue of causes was extended with a look at one half of them alone (`Untuned.is_seen`, a coin of the name): of
the other half, written before, 14 of 24 were explained before and 19 of 24 after. Then it was looked at as well, and
four more explanations were mended. `FAULTS` names the model that carries each, and the causes that are right for it.
"""

from __future__ import annotations

from typing import Any

import torch

from kvdrift_bench.planted.torch.parts import decoder_layers
from tests.support.untuned import attention, modules, storage
from tests.support.untuned.register import FAULTS, LAYER, Untuned


def model_for(fault: Untuned) -> Any:
    """Return the lively model of a fault."""
    from kvdrift_bench.models.tiny import lively_model

    model = lively_model(fault.architecture, torch.bfloat16)
    if fault.name == "norm_of_the_layer_input":
        decoder_layers(model)[LAYER].register_forward_pre_hook(modules.remember_layer_input)
    return model


__all__ = ["FAULTS", "Untuned", "attention", "model_for", "modules", "storage"]
