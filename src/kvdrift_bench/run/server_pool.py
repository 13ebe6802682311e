"""Recorded audits of servers in a folder, one file each: what was recorded once is not asked for again.

The answers are kept and no verdict: they are judged when they are read, by the rules of the kvdrift that reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvdrift.errors import UsageError
from kvdrift.server.judge import judge
from kvdrift.server.plan import ServerPlan
from kvdrift.server.values import Captured, ServerFacts
from kvdrift.vocabulary.evidence import Verdict


@dataclass(frozen=True, slots=True)
class Recorded:
    """One audit: what was captured, by which plan, and how it is judged."""

    setting: str
    facts: ServerFacts
    captured: Captured
    plan: ServerPlan
    seconds: float

    @property
    def verdict(self) -> Verdict:
        return judge(self.captured, self.facts, self.plan).verdict


@dataclass(frozen=True, slots=True)
class Pool:
    """A folder of recorded audits; with `folder` None nothing is kept."""

    folder: Path | None = None

    def get(self, name: str, record: Callable[[], Recorded]) -> Recorded:
        """Return the audit that was recorded under a name, or record it now.

        Raises:
            UsageError: the file is damaged or of another version, or cannot be written.
        """
        if self.folder is None:
            return record()
        path = self.folder / f"{re.sub('[^a-z0-9_.]+', '-', name.lower())}.msgpack"
        if path.exists():
            try:
                return msgspec.msgpack.decode(path.read_bytes(), type=Recorded)
            except (OSError, msgspec.MsgspecError) as error:
                raise UsageError(
                    f"cannot read the recorded audit {path}: {error}; remove it to record again"
                ) from error
        found = record()
        part = path.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(msgspec.msgpack.encode(found))
            os.replace(part, path)  # an interrupted run leaves no half of a file under this name
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; name another folder with --pool") from error
        return found
