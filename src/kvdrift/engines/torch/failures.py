"""Whose failure an exception is that came out of a forward call."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

# What a torch function mode calls the function in.
_CALLING = ("__torch_function__", "called_by_the_model")
_PACKAGE = str(Path(__file__).parents[2]) + os.sep


def is_ours(error: BaseException) -> bool:
    """Whether kvdrift's own code raised an exception inside the model's call: a bug, which keeps its traceback.

    A torch function that fails under a torch function mode fails where the mode calls it, whoever called it before.
    """
    frames = traceback.extract_tb(error.__traceback__)
    while len(frames) > 1 and frames[-1].name in _CALLING:
        frames.pop()
    return frames[-1].filename.startswith(_PACKAGE)


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
