"""A model or an engine that a user's own function makes: package.module:function."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from kvdrift.errors import EngineUnavailable, UsageError

# What a model that kvdrift does not know by itself needs.
WRAP_IT = "wrap it: docs/engines/own.md"


def names_function(spec: str | None) -> bool:
    """Whether the name of a model is that of a function.

    >>> names_function("mypackage.engines:make"), names_function("C:/models/x"), names_function("org/model")
    (True, False, False)
    """
    module, colon, function = (spec or "").partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def call_function(spec: str, prepare: Callable[[], None] | None = None) -> tuple[Any, Any]:
    """Call the user's own `package.module:function`, and return the model or engine that it makes and its tokenizer.

    `prepare` is called in between, when the module was imported, and with it what it needs.

    Raises:
        EngineUnavailable: it cannot be imported, or it failed.
        UsageError: it is no function.
    """
    module, _, function = spec.partition(":")
    sys.path.insert(0, "")  # `python -m` would find modules in the working directory; a console script must be told
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise EngineUnavailable(
            f"cannot import {module!r} of {spec!r}: {error}; run in the folder that holds it, or set PYTHONPATH"
        ) from error
    except AttributeError as error:
        if _raised_in(error) is not None:
            raise EngineUnavailable(f"importing {module!r} of {spec!r} failed: {_told(error)}") from error
        raise EngineUnavailable(f"{module!r} has no function {function!r}; check MODEL {spec!r}") from error
    except (Exception, SystemExit) as error:  # the user's own module may raise anything while it is imported
        raise EngineUnavailable(f"importing {module!r} of {spec!r} failed: {_told(error)}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        kind = type(found).__name__
        raise UsageError(f"{spec} is of type {kind}; it must be a function that returns (model, tokenizer)")
    if prepare is not None:
        prepare()
    try:
        result = found()
    except (Exception, SystemExit) as error:  # the same for the user's own function
        raise EngineUnavailable(f"{spec} failed: {_told(error)}; it is called without arguments") from error
    model, tokenizer = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    return model, tokenizer


def check_tokenizer(spec: str, tokenizer: Any) -> None:
    """Check what a user's own function returned as the tokenizer.

    Raises:
        UsageError: it is none.
    """
    if tokenizer is not None and not (callable(tokenizer) or callable(getattr(tokenizer, "encode", None))):
        raise UsageError(
            f"{spec} returned {type(tokenizer).__name__} as the tokenizer, which has no method encode; return None if "
            "there is none"
        )


def _raised_in(error: BaseException) -> str | None:
    """Return where in the user's own code an exception came from, None if it was raised in this module."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<frozen")]
    outside = [f for f in frames if f.filename not in (__file__, importlib.__file__)]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else None


def _told(error: BaseException) -> str:
    """An exception of the user's code as one line, with the place, since there will be no traceback."""
    where = _raised_in(error)
    return f"{type(error).__name__}: {first_words(error)}" + (f" ({where})" if where is not None else "")


def first_words(error: BaseException) -> str:
    """What an exception says, as one line of at most 240 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


__all__ = ["WRAP_IT", "call_function", "check_tokenizer", "first_words", "names_function"]
