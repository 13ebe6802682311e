"""From what a user names to a model and a tokenizer: the embedded default, a directory, a hub id, a GGUF file, or a
function of the user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvdrift.engines.hf.precision import DTYPES
from kvdrift.errors import EngineUnavailable, UsageError

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, its tokenizer (None if it has none), and the name under which it is reported."""

    model: Any
    tokenizer: Any
    name: str


def resolve_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype that a user named, None for the model's own."""
    if name is None or name == "auto":
        return None
    full = _DTYPE_ALIASES.get(name, name)
    if full not in DTYPES:
        known = ", ".join([*DTYPES, *_DTYPE_ALIASES])
        raise UsageError(f"unknown dtype {name!r}; use --dtype with one of {known}")
    return DTYPES[full]


def load_model(
    spec: str | None,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Loaded:
    """Load the model that `spec` names; None is the embedded default.

    Raises:
        UsageError: the dtype, the attention implementation or the device is not known.
        EngineUnavailable: there is no such model, or it is no causal language model.
    """
    wanted = resolve_dtype(dtype)
    target = _device(device)
    loaded = _load(spec, wanted, attention, progress)
    model = loaded.model
    if wanted is not None and any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
        model = model.to(wanted)
    if target is not None:
        try:
            model = model.to(target)
        except (RuntimeError, AssertionError) as error:
            raise EngineUnavailable(f"cannot move the model to --device {device}: {_line(error)}") from error
    return Loaded(model, loaded.tokenizer, loaded.name)


def _load(
    spec: str | None, dtype: torch.dtype | None, attention: str | None, progress: Callable[[str], None] | None
) -> Loaded:
    if spec is None:
        from kvdrift.engines.hf.demo import MODEL_NAME, demo_model_dir

        directory = demo_model_dir(progress)
        return _from_pretrained(str(directory), MODEL_NAME, {}, dtype, attention)
    module, colon, function = spec.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return _from_function(spec, module, function, attention)
    path = Path(spec)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{spec} is a file that is no .gguf; name a model directory, a hub id or a .gguf file")
        return _from_pretrained(str(path.parent), path.stem, {"gguf_file": path.name}, dtype, attention)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EngineUnavailable(f"the directory {spec} has no config.json, so it holds no transformers model")
        return _from_pretrained(spec, path.resolve().name, {}, dtype, attention)
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or spec.count("/") > 1:
        raise EngineUnavailable(f"there is no model at {spec}; check the path")
    return _from_pretrained(spec, spec, {}, dtype, attention)


def _from_function(spec: str, module: str, function: str, attention: str | None) -> Loaded:
    """Call the user's own `package.module:function`, which returns (model, tokenizer)."""
    sys.path.insert(0, "")  # `python -m` would find modules in the working directory; a console script must be told
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise EngineUnavailable(f"cannot import {module!r} of {spec!r}: {error}") from error
    except AttributeError as error:
        raise EngineUnavailable(f"{module!r} has no function {function!r}") from error
    finally:
        sys.path.remove("")
    result = found()
    model, tokenizer = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"{spec} returned {type(model).__name__}; it must return (model, tokenizer), tokenizer may be None"
        )
    if attention is not None:
        set_attention(model, attention)
    return Loaded(model, tokenizer, spec)


def set_attention(model: Any, attention: str) -> None:
    """Switch the attention implementation of a loaded model."""
    try:
        model.set_attn_implementation(attention)
    except (ValueError, KeyError, ImportError) as error:
        raise UsageError(f"cannot use --attn {attention}: {_line(error)}") from error


def _from_pretrained(
    source: str, name: str, where: dict[str, str], dtype: torch.dtype | None, attention: str | None
) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(source, **where)
        except (OSError, ValueError, KeyError) as error:
            raise EngineUnavailable(_cannot_load(source, error)) from error
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise EngineUnavailable(
                f"{name} is a {config.model_type} model, which transformers does not offer as a causal language model; "
                "kvdrift audits decoder-only language models."
            )
        options: dict[str, Any] = {"dtype": dtype or "auto", **where}
        if attention is not None:
            options["attn_implementation"] = attention
        try:
            model = AutoModelForCausalLM.from_pretrained(source, **options)
        except (ValueError, ImportError, KeyError) as error:
            if attention is not None and ("attention" in str(error).lower() or attention in str(error)):
                raise UsageError(f"cannot use --attn {attention}: {_line(error)}") from error
            raise EngineUnavailable(_cannot_load(source, error)) from error
        except OSError as error:
            raise EngineUnavailable(_cannot_load(source, error)) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
        except (OSError, ValueError, KeyError, ImportError):
            tokenizer = None  # prompts can still be given as token ids
    return Loaded(model, tokenizer, name)


def _cannot_load(source: str, error: BaseException) -> str:
    return (
        f"cannot load the model {source!r}: {_line(error)} "
        "Check the name; a hub id needs network access or an earlier download, a local model its directory."
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use --device cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailable("no CUDA device is available to this torch; use --device cpu")
    return device


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and warnings of the library off the terminal while the context is open."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
