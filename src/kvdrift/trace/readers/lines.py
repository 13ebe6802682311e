"""Lines of text files, plain or gzip, one at a time, with the place of every fault."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from kvdrift.errors import TraceError

# The full logits of a vocabulary of 300 000, printed, are 6 MB. What is longer is not a record.
MAX_LINE = 64 << 20

_T = TypeVar("_T")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of every line that is not empty.

    Raises:
        TraceError: the file cannot be read, is truncated, or has a line that no record can have.
    """
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise TraceError(
                        f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MB, so it is not a record"
                    )
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(
            f"{path}: the gzip file breaks off or is damaged after line {number} ({error}); copy or record it again"
        ) from error
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror or error}") from error


def decode(path: Path, number: int, line: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    """Return what a line holds.

    Raises:
        TraceError: it is not JSON, or not of the fields and types that a record has.
    """
    try:
        return decoder.decode(line)
    except msgspec.ValidationError as error:
        raise TraceError(f"{path}:{number}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path}:{number}: the line is not JSON ({error}); the file is damaged or cut off") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
