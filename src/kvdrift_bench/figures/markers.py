"""Putting figures between the markers of a document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvdrift.errors import UsageError


@dataclass(frozen=True, slots=True)
class Markers:
    """The lines between which a benchmark writes."""

    begin: str
    end: str

    @classmethod
    def of(cls, command: str) -> Markers:
        """Return the markers of a command, such as "kvdrift-bench faults"."""
        return cls(
            f"<!-- {command}: begin; written by the command, changes here are lost -->", f"<!-- {command}: end -->"
        )

    def write(self, path: Path, text: str) -> None:
        """Put `text` between the markers of the document, at its end if it has none yet.

        Raises:
            UsageError: the document has one marker without the other, or cannot be written.
        """
        try:
            document = path.read_text(encoding="utf-8") if path.exists() else ""
            begins, ends = document.count(self.begin), document.count(self.end)
            if (begins, ends) == (0, 0):
                gap = "\n" if document else ""
                document = f"{document}{gap}{self.begin}\n\n{text}\n{self.end}\n"
            elif (begins, ends) == (1, 1) and document.index(self.begin) < document.index(self.end):
                before = document[: document.index(self.begin)]
                after = document[document.index(self.end) + len(self.end) :]
                document = f"{before}{self.begin}\n\n{text}\n{self.end}{after}"
            else:
                raise UsageError(
                    f"{path} must have the marker lines once each and in this order: {self.begin!r}, {self.end!r}"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(document, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; name another file with --markdown") from error
