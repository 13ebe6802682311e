"""Pairs recorded values and measures their drift.

`kvdrift.compare(a, b)` is also what users call, and this package stands at that name: so it can be called.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, a: Any, b: Any, **options: Any) -> Any:
        """Compare A with B, as `kvdrift.pipeline.compare.compare` does, which has the description."""
        return import_module("kvdrift.pipeline.compare").compare(a, b, **options)


sys.modules[__name__].__class__ = _CallableModule
