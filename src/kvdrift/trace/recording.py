"""What any reader of trace files hands to the judge: facts, prompts and pairs of passes, one prompt at a time.

A reader knows one format of files and nothing of drift. What its files do not say stays None.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvdrift.errors import TraceError
from kvdrift.trace.manifest import Manifest
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.address import Spot
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import COARSEST

UNKNOWN_TOKEN = -1  # a token id that the files do not hold
MAX_POSITION = 1 << 24  # a position above this is a damaged file, and would fill the memory


SHARED = "*"  # the scenario of what all scenarios share
REFERENCE = "scenarios"  # label of the prefills that scenarios share


@dataclass(frozen=True, slots=True)
class RecordedPair:
    """The one event of the house: a pair of passes and what it is there for.

    Every source yields it and every sink takes it.

    Attributes:
        role: what the pair is there for. A specification has no counterpart: it is a pair of itself.
        pair: the two passes, and the positions at which they are compared.
        scenario: the scenario that made it, `SHARED` for what all of them share, None for plain decode.
        plant: the fault in the decode pass of a control.
        unequal: places whose bits differ, or may, whatever the recorded digits show.
        digits: how far the values there are then apart at most, relative to the value.
        shift: of perturbed passes, by what their layer inputs were changed: they are `x * (1 + shift * xi)`, xi
            standard normal and the same for either sign.
    """

    role: PairRole
    pair: PassPair
    scenario: str | None = None
    plant: Plant | None = None
    unequal: frozenset[Spot] = frozenset()
    digits: float = 5e-6  # a float32 printed with six significant digits
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Offset:
    """A decode pass that gives prefill's tokens positions `shift` higher: the first is at `position` of prefill."""

    mode: Mode
    prompt: str
    position: int
    shift: int

    def __str__(self) -> str:
        n, way = abs(self.shift), "after" if self.shift > 0 else "before"
        return (
            f"every token of decode stands {n} position{'s' if n > 1 else ''} {way} that of prefill (TRACE_OFFSET; "
            f"{self.prompt}, position {self.position} in prefill and {self.position + self.shift} in decode): one of "
            "the two counts positions wrongly"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A directory of traces, opened: a source of recorded pairs.

    Attributes:
        kind: the format, in words for people.
        facts: what the files say of the engine; `dtype` is the one in which the values lie in the files.
        pairs: yields every pair of passes, one prompt and rung in memory at a time; may be called again.
        remarks: caveats of these files, as code and text.
        gaps: what the files lack so that no pass can be given, each with what would settle it.
        sampled: what a pass misses where only a part of each tensor was recorded, and what would settle it.
        offsets: decode passes that give the tokens of prefill other positions; their values pair up by token.
        computed_in: the dtype in which the engine computed, None if it is not known.
        plausible: the coarsest dtype in which it may have computed, by the bits of its values.
        last_layer_known: False where the files do not say which layer is the last.
        manifest: what an audit of kvdrift said of its own run, None for files of other programs.
        close: drops what `pairs` keeps on the disk.
    """

    kind: str
    facts: EngineFacts
    prompts: tuple[Prompt, ...]
    modes: tuple[Mode, ...]
    pairs: Callable[[], Iterator[RecordedPair]]
    n_pairs: int
    remarks: tuple[tuple[str, str], ...] = ()
    gaps: tuple[str, ...] = ()
    sampled: str | None = None
    offsets: tuple[Offset, ...] = ()
    command: str | None = None
    created: str | None = None
    computed_in: str | None = None
    plausible: str = COARSEST
    last_layer_known: bool = True
    manifest: Manifest | None = None
    close: Callable[[], None] = lambda: None


def perturbed_label(name: str, shift: float) -> str:
    """Return the label of perturbed passes of a mode, or of a scenario.

    >>> perturbed_label("kv_aligned", -(2.0**-26))
    'kv_aligned.down26'
    """
    return f"{name}.{'up' if shift > 0.0 else 'down'}{-math.frexp(abs(shift))[1] + 1}"


class PairSink(Protocol):
    """Takes recorded pairs: a store, the tables of a run, a listener."""

    def add(self, item: RecordedPair) -> None:
        """Take one pair in."""
        ...

    def release(self) -> None:
        """Let go of the traces seen so far; no later pair refers to them."""
        ...


@dataclass(frozen=True, slots=True)
class Fan:
    """Hands every pair to several sinks, in their order."""

    sinks: Sequence[PairSink]

    def add(self, item: RecordedPair) -> None:
        """Hand a pair on."""
        for sink in self.sinks:
            sink.add(item)

    def release(self) -> None:
        """Hand the word on."""
        for sink in self.sinks:
            sink.release()


def inside(directory: Path, path: Path) -> Path:
    """Return `path` if it lies in `directory` once links are followed.

    Raises:
        TraceError: it lies elsewhere.
    """
    if not path.resolve().is_relative_to(directory.resolve()):
        raise TraceError(f"{path} leads out of {directory}; copy the file into the directory")
    return path


# A run has one folder for each rank, pass and prompt, or fewer.
_MOST_FOLDERS = 4096


def files_under(directory: Path, *suffixes: str) -> list[Path]:
    """Return the files under `directory` with one of `suffixes`, sorted; links to directories are not followed.

    Raises:
        TraceError: a file is a link that leads out of the directory, or there are so many folders that these are no
            traces.
    """
    found = []
    for number, (folder, _, names) in enumerate(os.walk(directory)):
        if number >= _MOST_FOLDERS:
            raise TraceError(
                f"{directory} has more than {_MOST_FOLDERS:,} folders in it, which no directory of traces has; name "
                "the folder that holds the traces"
            )
        paths = (Path(folder, name) for name in names if name.endswith(suffixes))
        found += [path for path in paths if path.is_file()]
    return [inside(directory, path) for path in sorted(found)]
