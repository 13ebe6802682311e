"""Results of a benchmark as JSON Lines, one record per subject; what was measured once is not measured again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import msgspec

from kvdrift.errors import UsageError
from kvdrift.vocabulary.progress import Progress

SubjectKind = Literal["fault", "twin", "clean"]
Place = tuple[int | None, str]  # layer, site
Key = tuple[str, str, str, str, str, str, str, int, int]

# Of the rules by which this benchmark judges a run; a record of another edition is measured again. 2: the native dtype
# alone is an audit with `--ladder off`.
EDITION = 2

LADDER, NATIVE = "ladder", "native"  # `--ladder model` and `--ladder off`: two ways to judge one capture


class Judged(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What kvdrift concluded.

    Attributes:
        address: the first failure, for people; `place` is its layer and site.
        cause: the diagnosis, None if there is none.
        effect: relative drift at the true place of the fault; the largest float if a key is lost there.
        detectable: the smallest effect that the audit says it can see.
        above: whether the effect is above that; None if either is not known.
        p_value: of the directed tests, None where they could not judge.
        minimum: the smallest size of each cause that they claim to see, if it is in all layers alike.
        estimates: causes that they found, and the size of each.
        right_address: whether the place is the planted one or the one right after it; None for what is not a fault.
    """

    verdict: str
    kind: str | None = None
    address: str | None = None
    place: Place | None = None
    cause: str | None = None
    effect: float | None = None
    detectable: float | None = None
    above: bool | None = None
    right_address: bool | None = None
    right_layer: bool | None = None
    right_cause: bool | None = None
    reasons: list[str] = []
    p_value: float | None = None
    minimum: dict[str, float] = {}
    estimates: dict[str, float] = {}

    @property
    def is_mismatch(self) -> bool:
        return self.verdict == "MISMATCH"

    @property
    def is_inconclusive(self) -> bool:
        return self.verdict == "INCONCLUSIVE"


class Step(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    """Where the alarm of a rule rises above all before it. `alarm` is None where no threshold would let it pass."""

    layer: int | None
    site: str
    alarm: float | None


class PeerRecord(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a peer's rule says; `steps` is None if it could not be applied."""

    flagged: bool
    first: Place | None = None
    steps: list[Step] | None = None


class Record(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One subject: a fault, a clean twin, or nothing at all planted in a model that was audited on one set of prompts.

    Attributes:
        skipped: why it was not run, None if it was.
        error: why the run or its diagnosis broke off, None if neither did.
        committed, changed: how often the fault was committed, and how often that changed a tensor.
        amount: the relative size of a fault that is a factor, None for others.
        in_all_layers: whether the fault is committed in every layer.
        edition: see `EDITION`; records without one are of the first.
        places: the true first layer and site of a fault, and the one right after.
    """

    model: str
    dtype: str
    attention: str
    prompts: str
    kind: SubjectKind
    name: str
    ladder: str
    span: int
    edition: int = 1
    mechanism: str | None = None
    cause: str | None = None
    keyed_to_dtype: bool = False
    amount: float | None = None
    in_all_layers: bool = False
    places: list[Place] = []
    skipped: str | None = None
    error: str | None = None
    committed: int = 0
    changed: int = 0
    n_tensors: int = 0
    seconds: float = 0.0
    kvdrift: dict[str, Judged] = {}
    peers: dict[str, PeerRecord] = {}

    @property
    def key(self) -> Key:
        return (
            self.model,
            self.dtype,
            self.attention,
            self.prompts,
            self.kind,
            self.name,
            self.ladder,
            self.span,
            self.edition,
        )

    @property
    def setting(self) -> str:
        """Model, dtype and attention implementation, for people."""
        return f"{self.model} {self.dtype} {self.attention}"


class Kept(Protocol):
    """What is kept in a file: a msgspec structure that knows what it measured."""

    @property
    def key(self) -> tuple[object, ...]: ...


R = TypeVar("R", bound=Kept)
T = TypeVar("T")


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Return the records of a file, none if it is not there. A last line that was cut off is left out.

    Raises:
        UsageError: a line is not a record; the message names it.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            records.append(msgspec.json.decode(line, type=kind))
        except msgspec.MsgspecError as error:
            raise UsageError(
                f"{path}:{number}: not a record of this benchmark: {error}; name another file with --out"
            ) from error
    return records


class RecordFile(Generic[R]):
    """Appends records to a file; each is on disk, whole, before the next one is measured."""

    def __init__(self, path: Path | None, kind: type[R]) -> None:
        self.path = path
        self.records: list[R] = [] if path is None else read_records(path, kind)
        self._keys = {record.key for record in self.records}
        if path is not None:
            self._drop_torn_line(path)

    def missing(self, items: Iterable[T], key: Callable[[T], tuple[object, ...]]) -> list[T]:
        """Return the items whose record, of this key, is not here yet."""
        return [item for item in items if key(item) not in self._keys]

    def measure(
        self, items: Sequence[T], measure: Callable[[T], R], label: Callable[[T], str], progress: Progress
    ) -> Iterator[R]:
        """Measure item after item, add each record and yield it; `label` says of an item what is shown meanwhile."""
        progress.start(len(items))
        for item in items:
            progress.step(label(item))
            record = measure(item)
            self.add(record)
            yield record

    def add(self, record: R) -> None:
        """Append a record."""
        self.records.append(record)
        self._keys.add(record.key)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(record) + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def _drop_torn_line(self, path: Path) -> None:
        """Cut off what an interrupted run left of its last line: it must not join the next one."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                data = file.read()
                file.truncate(data.rfind(b"\n") + 1)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; name another file with --out") from error


def of_keys(records: Iterable[R], keys: Iterable[tuple[object, ...]]) -> list[R]:
    """Return the records with one of `keys`, in the order of the keys."""
    by_key = {record.key: record for record in records}
    return [by_key[key] for key in dict.fromkeys(keys) if key in by_key]
