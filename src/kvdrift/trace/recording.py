"""What any reader of trace files hands to the judge: facts, prompts and pairs of passes, one prompt at a time.

A reader knows one format of files and nothing of drift. What its files do not say stays None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvdrift.errors import TraceError
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

UNKNOWN_TOKEN = -1  # a token id that the files do not hold
MAX_POSITION = 1 << 24  # a position above this is a damaged file, and would fill the memory

Place = tuple[int | None, Site, int]  # layer, site, position


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the files say about the engine; None is unknown.

    `stored` is the dtype in which the values lie in the files, `arithmetic` the one in which the engine computed.
    """

    engine: str
    model: str
    stored: str
    arithmetic: str | None = None
    model_hash: str | None = None
    device: str | None = None
    attention: str | None = None
    cache: str | None = None
    n_layers: int
    last_layer_known: bool = True  # False where files do not say which layer is the last
    vocab_size: int | None = None
    max_positions: int | None = None
    parameters: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RecordedPrompt:
    """A prompt: all its token ids, and the positions at which passes are compared."""

    name: str
    tokens: tuple[int, ...]
    probed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RecordedPair:
    """A pair of passes. `unequal` are places whose bits differ, or may, whatever the recorded digits show; `digits` is
    how far they are then apart at most, relative to the value."""

    role: Literal["pair", "self_noise"]
    pair: PassPair
    unequal: frozenset[Place] = frozenset()
    digits: float = 5e-6  # a float32 printed with six significant digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A directory of trace files, opened.

    Attributes:
        kind: the format, in words for people.
        pairs: yields every pair of passes, one prompt and rung in memory at a time; may be called again.
        remarks: caveats of these files, as code and text.
        gaps: what the files lack so that no pass can be given, each with what would settle it.
        close: drops what `pairs` keeps on the disk.
    """

    kind: str
    facts: Facts
    prompts: tuple[RecordedPrompt, ...]
    modes: tuple[Mode, ...]
    pairs: Callable[[], Iterator[RecordedPair]]
    n_pairs: int
    remarks: tuple[tuple[str, str], ...] = ()
    gaps: tuple[str, ...] = ()
    command: str | None = None
    created: str | None = None
    close: Callable[[], None] = lambda: None


def inside(directory: Path, path: Path) -> Path:
    """Return `path` if it lies in `directory` once links are followed.

    Raises:
        TraceError: it lies elsewhere.
    """
    if not path.resolve().is_relative_to(directory.resolve()):
        raise TraceError(f"{path} leads out of {directory}; copy the file into the directory")
    return path


def files_under(directory: Path, *suffixes: str) -> list[Path]:
    """Return the files under `directory` with one of `suffixes`, sorted; links to directories are not followed.

    Raises:
        TraceError: a file is a link that leads out of the directory.
    """
    found = [path for path in directory.rglob("*") if path.name.endswith(suffixes) and path.is_file()]
    return [inside(directory, path) for path in sorted(found)]
