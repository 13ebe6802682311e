"""Whether the installed transformers is one that this engine can watch."""

from __future__ import annotations

import re

from kvdrift.errors import EngineUnavailable

# The first release whose caches take tokens back with a negative `crop` and record what they would forget before it.
LEAST_TRANSFORMERS = (5, 15)


def require_transformers(installed: str) -> None:
    """Check the version of transformers, as it gives it itself (`transformers.__version__`).

    Raises:
        EngineUnavailable: it is older than the first one that can be watched, or names no version.
    """
    found = re.match(r"(\d+)\.(\d+)", installed)
    if found is None or (int(found[1]), int(found[2])) < LEAST_TRANSFORMERS:
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        raise EngineUnavailable(
            f"transformers {installed} is installed, and kvdrift needs {least} or later, whose caches can go back; "
            f"pip install --upgrade 'transformers>={least}'"
        )


__all__ = ["LEAST_TRANSFORMERS", "require_transformers"]
