"""The catalogue: what is known of every planted fault and clean twin, once for all engines."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

import msgspec

from kvdrift.errors import UsageError
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.facts import ALL_DTYPES, FaultFacts, TwinFacts

Engine = Literal["torch", "llamacpp"]
Engines = Literal["torch", "llamacpp", "both"]
Passes = Literal["decode", "both"]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line, or a part of one, that holds what it may hold and nothing else."""


class FaultDifferences(_Struct, frozen=True):
    """What one engine has otherwise than the line of a fault says; None where it has the same."""

    sites: tuple[Site, ...] | None = None
    where: str | None = None
    also: tuple[Cause, ...] | None = None
    amount: float | None = None
    undiagnosable: str | None = None
    keyed: bool | None = None


class TwinDifferences(_Struct, frozen=True):
    """What one engine has otherwise than the line of a clean twin says."""

    why: str


class FaultLine(_Struct, frozen=True):
    """A line of the catalogue that describes a fault. The head of catalogue.toml says what each field means."""

    engines: Engines = msgspec.field(name="in")
    mechanism: str = msgspec.field(name="class")
    reference: str = msgspec.field(name="ref")
    cause: Cause
    sites: tuple[Site, ...]
    where: str
    layer: Literal["two_thirds", "one_below"] | None = None
    needs: str | None = None
    dtypes: tuple[str, ...] = ALL_DTYPES
    keyed: bool = False
    also: tuple[Cause, ...] = ()
    amount: float | None = None
    undiagnosable: str | None = None
    llamacpp: FaultDifferences | None = None

    def facts(self, name: str, fault_layer: int) -> FaultFacts:
        """Return what is known of the fault where faults of one layer are planted in `fault_layer`."""
        below = fault_layer - 1
        return FaultFacts(
            name=name,
            mechanism=self.mechanism,
            reference=self.reference,
            where=self.where.replace("{layer}", str(fault_layer)).replace("{below}", str(below)),
            sites=self.sites,
            cause=self.cause,
            layer={"two_thirds": fault_layer, "one_below": below, None: None}[self.layer],
            keyed_to_dtype=self.keyed,
            also=self.also,
            amount=self.amount,
            undiagnosable=self.undiagnosable,
        )


class TwinLine(_Struct, frozen=True):
    """A line of the catalogue that describes a clean twin."""

    engines: Engines = msgspec.field(name="in")
    reference: str = msgspec.field(name="ref")
    why: str
    llamacpp: TwinDifferences | None = None

    def facts(self, name: str) -> TwinFacts:
        """Return what is known of the twin."""
        return TwinFacts(name=name, reference=self.reference, why=self.why)


class KernelLine(_Struct, frozen=True):
    """A line of the catalogue that describes a correct kernel of torch models."""

    engine: str = msgspec.field(name="as")
    why: str
    computes: str = "float32"
    passes: tuple[Passes, ...] = ("decode", "both")


class KernelFaultLine(_Struct, frozen=True):
    """A line of the catalogue that describes a fault of a kernel."""

    under: str
    where: str
    sites: tuple[Site, ...]
    layer: Literal["two_thirds"] | None = None
    cause: Cause = Cause.UNEXPLAINED


class Catalogue(_Struct, frozen=True):
    """All lines, by their names and in the order in which they are written."""

    faults: dict[str, FaultLine] = {}
    twins: dict[str, TwinLine] = {}
    kernels: dict[str, KernelLine] = {}
    kernel_faults: dict[str, KernelFaultLine] = {}

    def faults_of(self, engine: Engine) -> dict[str, FaultLine]:
        """Return the lines of the faults that are planted in `engine`, as they read for it."""
        return {name: _read_for(engine, line) for name, line in self.faults.items() if line.engines in (engine, "both")}

    def twins_of(self, engine: Engine) -> dict[str, TwinLine]:
        """Return the lines of the clean twins of `engine`, as they read for it."""
        return {name: _read_for(engine, line) for name, line in self.twins.items() if line.engines in (engine, "both")}


Line = TypeVar("Line", FaultLine, TwinLine)


def _read_for(engine: Engine, line: Line) -> Line:
    """Return the line with what is different in `engine`."""
    if engine == "torch" or line.llamacpp is None:
        return line
    others = {key: value for key, value in msgspec.structs.asdict(line.llamacpp).items() if value is not None}
    return msgspec.structs.replace(line, **others)


def read_catalogue(text: str) -> Catalogue:
    """Return the catalogue that is written in `text`, with the groups of its sites and dtypes put in their places.

    Raises:
        UsageError: the text is not TOML, or a line lacks something, holds too much, or names an unknown group, site or
            cause.
    """
    try:
        raw = tomllib.loads(text)
        groups = {key: raw.pop(key, {}) for key in ("sites", "dtypes")}
        for line in [*raw.get("faults", {}).values(), *raw.get("kernel_faults", {}).values()]:
            _put_groups(line, groups)
            _put_groups(line.get("llamacpp", {}), groups)
        return msgspec.convert(raw, Catalogue)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"the catalogue of faults cannot be read: {error}") from error


def _put_groups(line: dict[str, Any], groups: Mapping[str, Mapping[str, list[str]]]) -> None:
    for key, named in groups.items():
        if isinstance(line.get(key), str):
            if line[key] not in named:
                raise UsageError(f"the catalogue of faults has no group of {key} named {line[key]!r}")
            line[key] = named[line[key]]


@cache
def catalogue() -> Catalogue:
    """Return the catalogue that is shipped."""
    return read_catalogue((files("kvdrift_bench") / "catalogue.toml").read_text(encoding="utf-8"))
