"""Files of traces as memory that the system fills in where a value is read, and takes back when it was used.

A mapped page is a copy of the file. It counts as memory of this process until it is let go of, and a value that is read
again afterwards comes from the file again. So what a trace takes does not grow with its file.
"""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass, field
from pathlib import Path

# Files below this are not worth a call to the system.
_SMALL = 8 << 20
# Bytes that are read before the pages of a file are let go of.
_BUDGET = 32 << 20


@dataclass(slots=True)
class Pages:
    """The mapped pages of one file; `data` is its bytes, empty for an empty file."""

    data: mmap.mmap | bytes
    _n_read: int = field(default=0, repr=False)

    def count(self, n_bytes: int) -> None:
        """Note that so many bytes were read, and let go of all pages once they are many."""
        self._n_read += n_bytes
        if self._n_read >= _BUDGET:
            self.release()

    def release(self) -> None:
        """Let go of all pages. Arrays on them stay valid, and read the file again where they are read again."""
        self._n_read = 0
        if isinstance(self.data, mmap.mmap) and len(self.data) >= _SMALL and hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path) -> Pages:
    """Map a file for reading.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return Pages(b"")  # nothing can be mapped
        return Pages(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; it is read by block.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
