"""Tiny random models of mlx-lm, one for each module of `mlx_lm.models` that has a model and its arguments.

mlx-lm has no default configurations: most arguments have none. What an argument is called says how large it is made, by
the same table as for transformers (`kvdrift.zoo.shrink`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

from kvdrift.zoo.own_mlx import OWN_MLX, TEXT_OF, VALUES
from kvdrift.zoo.shrink import small

_SEED = 1234
_PEAKED = re.compile(r"q_proj|k_proj|qkv|wq|wk|query_key_value|c_attn|W_pack")
_MANY = 1 << 30  # a size that every rule makes smaller
_MOST = 20_000_000
_N_LAYERS = 4


def registered_mlx() -> list[str]:
    """Return the types of models that the installed mlx-lm has, without importing them.

    Raises:
        ModuleNotFoundError: mlx-lm is not installed.
    """
    found = importlib.util.find_spec("mlx_lm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("mlx_lm")
    (folder,) = (Path(place) / "models" for place in found.submodule_search_locations)
    return sorted(
        file.stem
        for file in folder.glob("*.py")
        if {"class Model(", "class ModelArgs("}
        <= {line[: line.find("(") + 1] for line in file.read_text().splitlines()}
    )


def tiny_arguments(kind: str, **changes: Any) -> dict[str, Any]:
    """Return a configuration of a type as mlx-lm reads it from config.json, with `changes`."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    found = _filled(module.ModelArgs)
    inner = TEXT_OF.get(kind)
    if inner is not None:
        place, _, name = inner.partition(":")
        named: Any = importlib.import_module(f"mlx_lm.models.{place}")
        own = OWN_MLX.get(place, {}) if place != kind else {}
        found["text_config"] = {**_filled(getattr(named, name)), "model_type": place, **own}
    own = dict(OWN_MLX.get(kind, {}))
    if "text_config" in own:
        own["text_config"] = {**found.get("text_config", {}), **own["text_config"]}
    return {**found, "model_type": kind, **own, **changes}


def _filled(arguments: Any) -> dict[str, Any]:
    """Return every argument of a data class: a small value for one without a default, and its own made small."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            values[field.name] = _value(field.name, str(field.type))
        elif default is not None:
            values[field.name] = _size(field.name, default)
    return {name: value for name, value in values.items() if value is not None}


def _value(name: str, annotation: str) -> Any:
    """Return a small value for an argument that has no default; None where its name tells nothing."""
    for pattern, value in VALUES:
        if re.fullmatch(pattern, name):
            return value
    if "bool" in annotation:
        return False
    if "int" in annotation and "List" not in annotation:
        size = _size(name, _MANY)
        return None if size == _MANY else size
    return 1.0 if "float" in annotation and "List" not in annotation else None


def _size(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers|num_transformer_layers", name):
        return _N_LAYERS
    if re.fullmatch(r"(swa_)?num_(key_value|kv)_heads|n_kv_heads|num_attention_groups", name):
        return min(value, 2)
    return small(name, value)


def build_mlx(kind: str, **changes: Any) -> Any:
    """Return a tiny float32 model of a type of mlx-lm, with random weights that are the same each time.

    `changes` are of its configuration. Weights are large enough for every part to matter, as in
    `kvdrift.zoo.build`.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.set_default_device(mx.cpu)
    mx.random.seed(_SEED)
    model = module.Model(module.ModelArgs.from_dict(tiny_arguments(kind, **changes)))
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    if size > _MOST:  # nothing has been computed yet
        raise ValueError(f"it has {size:,} parameters when it is made small")
    weights = [
        (name, _enlivened(name, value.astype(mx.float32)))
        for name, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
    ]
    model.load_weights(weights, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model


def _enlivened(name: str, values: Any) -> Any:
    import mlx.core as mx

    if values.ndim < 2:
        return values + 0.2 * mx.random.normal(values.shape)
    if name.endswith("A_log"):
        return values
    spread = float(mx.std(values))
    if spread == 0.0:
        return values + 0.1 * mx.random.normal(values.shape)
    values = values * (0.25 / spread) if spread < 0.2 else values
    return values * 1.5 if _PEAKED.search(name) else values


__all__ = ["build_mlx", "registered_mlx", "tiny_arguments"]
