"""Keeping the libraries under the engine off the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' logs, warnings and progress bars off stderr; put everything back afterwards."""
    from transformers.utils import logging

    reader = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
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
            logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
