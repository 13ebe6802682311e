"""Two releases of a package beside each other: which, where they come from, and the process that each is audited in."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift_bench.run.history_child import HistoryAudit, HistoryTask

PASSES = ("EXACT", "STRUCTURAL_DRIFT")
_TIMEOUT = 300.0  # seconds that one release may take


class ReleasePair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A bug: the last release that has it, the first one that does not, and where that was made public.

    Attributes:
        mends: what the mending change says was wrong, in short.
        model: the name of a configuration in the catalogue, or a type of the zoo for a pair of transformers.
        scenario: the way on which it shows.
        cache, padding, step: more of that way in mlx-lm; see `kvdrift.engines.mlx.routes.Batching`.
    """

    name: str
    package: Literal["mlx-lm", "transformers"]
    before: str
    after: str
    reference: str
    mends: str
    model: str
    scenario: str
    cache: str = "default"
    padding: Literal["left", "right"] = "left"
    step: int | None = None


class AbsentPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A bug whose releases are not run, and why."""

    name: str
    reference: str
    reason: str


class ReleaseCatalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The catalogue.

    Attributes:
        model: configurations of models of mlx-lm.
        wheels: the SHA-256 of each wheel under "package version".
        beside: further wheels that a release needs, because it refuses the installed versions of its requirements.
    """

    pair: list[ReleasePair]
    model: dict[str, dict[str, Any]]
    wheels: dict[str, str]
    beside: dict[str, list[str]] = {}
    absent: list[AbsentPair] = []


class PairResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of both releases of a pair."""

    pair: ReleasePair
    before: HistoryAudit
    after: HistoryAudit

    @property
    def told_apart(self) -> bool:
        """Whether the bug was found, and its mend passes."""
        return self.before.verdict == "MISMATCH" and self.after.verdict in PASSES


@cache
def history() -> ReleaseCatalogue:
    """Return the catalogue that comes with the benchmark."""
    text = (files("kvdrift_bench") / "history.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), ReleaseCatalogue)


def choose_pairs(names: Sequence[str]) -> list[ReleasePair]:
    """Return the pairs of these names, or all of them.

    Raises:
        UsageError: a name is unknown.
    """
    known = {pair.name: pair for pair in history().pair}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"unknown pair {unknown[0]!r}; --pair takes one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or list(known.values())


def unpacked(package: str, version: str, folder: Path, *, offline: bool = False) -> Path:
    """Return the folder in which a wheel lies unpacked, after having fetched it if need be.

    Raises:
        EngineUnavailable: it is not there and cannot be fetched, or it is not the wheel that the catalogue means.
    """
    target = folder / f"{package}-{version}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as space:
        wheel = _fetched(package, version, folder, Path(space), offline=offline)
        known, found = history().wheels.get(f"{package} {version}"), hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != known:
            raise EngineUnavailable(
                f"{wheel.name} has the SHA-256 {found}, and the catalogue of releases has {known}; it is not unpacked"
            )
        with zipfile.ZipFile(wheel) as file:
            file.extractall(Path(space) / "unpacked")
        (Path(space) / "unpacked").rename(target)
    return target


def _fetched(package: str, version: str, folder: Path, space: Path, *, offline: bool) -> Path:
    """Return the wheel of a release: one that lies in `folder`, or one that pip fetches into `space`."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if held := sorted(folder.glob(pattern)):
        return held[0]
    if offline:
        raise EngineUnavailable(
            f"{package} {version} is not in {folder}; leave --offline out, or put its wheel there (--folder)"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(space), f"{package}=={version}"], capture_output=True, text=True, check=False
    )
    found = sorted(space.glob(pattern))
    if done.returncode or not found:
        said = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no wheel came")
        raise EngineUnavailable(
            f"{package} {version} cannot be fetched: {said}; put its wheel into {folder} (--folder)"
        )
    return found[0]


def run_pair(pair: ReleasePair, folder: Path, *, offline: bool = False) -> PairResult:
    """Audit both releases of a pair, each in a process of its own."""
    before, after = (_audited(pair, version, folder, offline=offline) for version in (pair.before, pair.after))
    return PairResult(pair=pair, before=before, after=after)


def run_pairs(pairs: Sequence[ReleasePair], folder: Path, *, offline: bool = False) -> Iterator[PairResult]:
    """Audit the releases of pairs, one after the other."""
    for pair in pairs:
        yield run_pair(pair, folder, offline=offline)


def _audited(pair: ReleasePair, version: str, folder: Path, *, offline: bool) -> HistoryAudit:
    place = unpacked(pair.package, version, folder, offline=offline)
    names = [name.split() for name in history().beside.get(f"{pair.package} {version}", ())]
    beside = [unpacked(name, its_version, folder, offline=offline) for name, its_version in names]
    task = HistoryTask(
        package=pair.package,
        folder=str(place.resolve()),
        version=version,
        model=pair.model,
        config=history().model.get(pair.model, {}),
        scenario=pair.scenario,
        cache=pair.cache,
        padding=pair.padding,
        step=pair.step,
    )
    with tempfile.TemporaryDirectory(prefix="kvdrift-history-") as space:
        given, result = Path(space) / "task.json", Path(space) / "result.json"
        given.write_bytes(msgspec.json.encode(task))
        command = [sys.executable, "-m", "kvdrift_bench.run.history_child", str(given), str(result)]
        try:
            done = subprocess.run(
                command, env=_with([place, *beside]), capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return HistoryAudit(said=f"it took more than {_TIMEOUT:g} s", seconds=_TIMEOUT)
        if not result.exists():
            said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
            return HistoryAudit(said=f"its process ended with {done.returncode} and said: {said}")
        return msgspec.json.decode(result.read_bytes(), type=HistoryAudit)


def _with(places: Sequence[Path]) -> Mapping[str, str]:
    """The environment of a process that imports the releases in `places`, and else what this one imports."""
    rest = [entry for entry in sys.path if entry and Path(entry).is_dir()]
    own = [entry for entry in rest if "site-packages" not in entry and not entry.startswith(sys.base_prefix)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*(str(place.resolve()) for place in places), *own])}


__all__ = [
    "PASSES",
    "AbsentPair",
    "PairResult",
    "ReleaseCatalogue",
    "ReleasePair",
    "choose_pairs",
    "history",
    "run_pair",
    "run_pairs",
    "unpacked",
]
