"""Keeping the libraries under the engine off the terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep what libraries log while they are imported off stderr: of optional parts of theirs that do not load here."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' logs, warnings and progress bars off stderr; put everything back afterwards."""
    from transformers.utils import logging as transformers_logging

    reader = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    if bar is not None:  # this module takes its bar from tqdm itself, where the switch above does not reach it
        setattr(reader, "tqdm", lambda items, **_options: items)  # noqa: B010 - mypy knows no such attribute
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bar is not None:
            setattr(reader, "tqdm", bar)  # noqa: B010
        if had_bars:
            transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
