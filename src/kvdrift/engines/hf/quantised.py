"""Quantised caches of transformers, and the honest ones that they are held against.

The honest cache is an ordinary dynamic one whose rows go through `kvdrift.replay.quantisation`: it shares no code with
the engine's quantiser, and the model runs on it as on any cache.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdrift.engines.torch.arrays import to_array, to_tensor
from kvdrift.engines.torch.compiler import turn_to_compile
from kvdrift.replay.quantisation import FORMATS, RESIDUAL, Format, HonestRows, group_size

QUANTISED_KINDS = tuple(FORMATS)
HONEST = "honest-"  # before the name of a quantised kind: the cache that it is held against


def open_quantised(kind: str, config: Any) -> Any:
    """Return the empty quantised cache of transformers of a kind.

    Raises:
        ImportError: its package is not installed.
        ValueError: the model has layers that cannot be quantised.
    """
    from transformers import QuantizedCache

    form = FORMATS[kind]
    if form.n_bits is None:
        return QuantizedCache("fp8", config)
    return QuantizedCache(
        "quanto", config, nbits=form.n_bits, q_group_size=group_size(*_dims(config)), residual_length=RESIDUAL
    )


def _dims(config: Any) -> tuple[int, ...]:
    """How many values a head of K and of V has."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = getattr(config, "qk_head_dim", None) or head
    return int(key), int(getattr(config, "v_head_dim", None) or head)


def why_not_quantised(kind: str, config: Any) -> str | None:
    """Say why a kind of quantised cache cannot be had for a model; None if it can. Tries one row."""
    try:
        open_quantised("quantised-fp8", config)  # has no package and no groups to fail on: only the layers count
        layer = open_quantised(kind, config).layers[0]
    except ImportError:
        needed = "pip install optimum-quanto, which compiles a file on first use"
        return f"a cache of {FORMATS[kind].name} needs a package: {needed}"
    except (ValueError, AttributeError, TypeError) as error:
        return f"this model has no quantised cache: {next(iter(str(error).splitlines()), type(error).__name__)}"
    row = torch.zeros(1, 1, 1, _dims(config)[0])
    try:
        with _turn_to_compile(kind):
            for _ in range(2):
                layer.update(row, row)
    except Exception as error:  # noqa: BLE001 - a compiler that is not there fails in many ways
        return f"its quantiser does not run here: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _turn_to_compile(kind: str) -> AbstractContextManager[None]:
    """A turn at the compiler, which quanto starts when a row is read for the first time."""
    if FORMATS[kind].n_bits is None:
        return nullcontext()
    try:
        folder = import_module("optimum.quanto.library.extensions.cpp").ext.build_directory
    except (ImportError, AttributeError):  # another version, which may compile elsewhere, or nothing
        return nullcontext()
    return turn_to_compile(Path(folder))


def open_honest(kind: str, config: Any) -> Any:
    """Return the empty honest cache for a quantised kind: every layer grows by concatenation."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    form, size = FORMATS[kind.removeprefix(HONEST)], group_size(*_dims(config))
    for layer in cache.layers:
        _make_honest(layer, form, size)
    return cache


def _make_honest(layer: Any, form: Format, size: int) -> None:
    keys, values = HonestRows(form, size), HonestRows(form, size)

    def update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        layer.keys = _extended(keys, key_states)
        layer.values = _extended(values, value_states)
        return layer.keys, layer.values

    layer.update = update


def _extended(rows: HonestRows, states: Tensor) -> Tensor:
    return to_tensor(rows.extend(to_array(states)), states.device)
