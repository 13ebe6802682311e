"""Recorded passes: the value between capture and comparison, in memory and on disk.

`Writer` is for other programs: it writes a directory that `kvdrift judge` takes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvdrift.trace.writer import Writer


def __getattr__(name: str) -> Any:
    # Not imported above: the modules of this package import each other through it.
    if name == "Writer":
        from kvdrift.trace.writer import Writer

        return Writer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Writer"]
