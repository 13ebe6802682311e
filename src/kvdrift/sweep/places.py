"""Which files belong to the place that a sweep was given."""

from __future__ import annotations

from pathlib import Path

from kvdrift.sweep.files import Files, LocalFiles


def files_of(place: str | Path) -> Files:
    """Return the files of a directory: `protocol://...` as fsspec takes it, or a path.

    Raises:
        EngineUnavailable: fsspec, or what it needs for this protocol, is not installed.
        UsageError: fsspec knows no such protocol.
    """
    protocol, colon, rest = str(place).partition("://")
    if not colon:
        return LocalFiles(Path(place))
    if protocol in ("file", "local"):
        return LocalFiles(Path(rest))
    from kvdrift.sweep.remote import RemoteFiles

    return RemoteFiles(str(place))
