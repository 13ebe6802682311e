"""From files that hold one pass each to a recording: pairs them by prompt, and loads one prompt at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvdrift.errors import AlignmentError, TraceError
from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.readers.absent import absent_sites, without
from kvdrift.trace.readers.holes import compared_positions
from kvdrift.trace.readers.written import DECODE, PREFILL, PREFILL_AGAIN
from kvdrift.trace.recording import RecordedPair, Recording
from kvdrift.vocabulary.address import Spot
from kvdrift.vocabulary.facts import EngineFacts, Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.sites import Site

_NAME = re.compile(r"(?P<prompt>.+)\.(?P<kind>prefill|prefill_again|decode)(?:\.(?P<mode>as_designed|kv_aligned))?")
FACTS = "facts.json"


@dataclass(frozen=True, slots=True)
class LoadedPass:
    """A pass in memory. `partial` are places of which a part was recorded; `printed` those known by their digits."""

    trace: Trace
    n_recorded: int = 0
    n_elements: int = 0
    printed: frozenset[Spot] = frozenset()
    strange: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PassFiles:
    """The files of one pass, and how they are loaded, given the token ids of the prompt's prefill (None for itself)."""

    where: Path
    prompt: str
    kind: str
    mode: Mode | None
    load: Callable[[tuple[int, ...] | None], LoadedPass]


@dataclass(slots=True)
class _Survey:
    probed: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rungs: dict[str, str] = field(default_factory=dict)  # rung -> the first prompt that has it
    layers: set[int] = field(default_factory=set)
    sites: set[Site] = field(default_factory=set)
    strange: dict[str, None] = field(default_factory=dict)
    n_recorded: int = 0
    n_elements: int = 0


class Stated(NamedTuple):
    """facts.json: what the one who recorded knows of the engine. What is left out stays unknown, and is not among the
    names in `given`."""

    facts: EngineFacts
    given: frozenset[str]
    absent: frozenset[Site] = frozenset()

    def get(self, name: str) -> Any:
        """Return a fact, None if it was not given."""
        return getattr(self.facts, name) if name in self.given else None


# What facts.json may say.
_STATED = frozenset(
    {
        "engine",
        "model",
        "dtype",
        "n_layers",
        "model_hash",
        "device",
        "attention",
        "cache",
        "vocab_size",
        "versions",
        "notes",
    }
)
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}
_UNSTATED = {"engine": "", "model": "unknown", "dtype": "", "n_layers": 1}


def parse_name(path: Path, name: str) -> tuple[str, str, Mode | None]:
    """Return prompt, pass and mode that a name such as `p0.decode.kv_aligned` gives; the mode of prefill is None.

    Raises:
        TraceError: the name does not follow the rule.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["mode"] is not None and match["kind"] != DECODE):
        raise TraceError(
            f"{path} is not named PROMPT.prefill, PROMPT.prefill_again, PROMPT.decode or PROMPT.decode.kv_aligned"
        )
    mode = Mode(match["mode"] or Mode.AS_DESIGNED) if match["kind"] == DECODE else None
    return match["prompt"], match["kind"], mode


def read_stated(directory: Path) -> Stated:
    """Return what facts.json says; nothing where there is none.

    Raises:
        TraceError: it cannot be read, or holds something else.
    """
    path = directory / FACTS
    if not path.is_file():
        return _stated({})
    if not path.resolve().is_relative_to(directory.resolve()):
        raise TraceError(f"{path} leads out of {directory}; copy the file into the directory")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        if isinstance(name := found.get("dtype"), str):
            found["dtype"] = _SHORT.get(name.lower(), name)
        absent = found.pop("absent", None)
        stated = _stated(found)
        if absent is not None:
            stated = stated._replace(absent=absent_sites(msgspec.convert(absent, list[str]), path))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path} is not a readable list of facts: {error}") from error
    if stated.get("dtype") not in (None, "bfloat16", "float16", "float32", "float64"):
        raise TraceError(f"{path}: the dtype is {stated.facts.dtype!r}; write bfloat16, float16, float32 or float64")
    return stated


def _stated(found: dict[str, Any]) -> Stated:
    """Check what facts.json holds; null stands for what is not known.

    Raises:
        msgspec.ValidationError: it holds something else.
    """
    given = {name: value for name, value in found.items() if value is not None}
    if strange := sorted(given.keys() - _STATED):
        raise msgspec.ValidationError(f"Object contains unknown field `{strange[0]}`")
    return Stated(msgspec.convert({**_UNSTATED, **given}, EngineFacts), frozenset(given))


def recording_of(
    kind: str,
    engine: str,
    passes: Sequence[PassFiles],
    stated: Stated,
    *,
    digits: float = 0.0,
    remarks: Sequence[tuple[str, str]] = (),
    gaps: Sequence[str] = (),
) -> Recording:
    """Return the recording of passes that lie in files of their own.

    Raises:
        TraceError: a file is damaged, a decode pass has no prefill, or dtypes differ.
    """
    groups: dict[str, list[PassFiles]] = defaultdict(list)
    for item in passes:
        groups[item.prompt].append(item)
    ordered = {name: _ordered(found) for name, found in groups.items()}
    survey = _survey(ordered)
    stored = next(iter(survey.rungs), "float32")

    def pairs() -> Iterator[RecordedPair]:
        for found in ordered.values():
            yield from _pairs(found, digits)

    sampled = None
    if survey.n_recorded < survey.n_elements:
        sampled = (
            f"{survey.n_recorded} of {survey.n_elements} elements were recorded, and the rest may differ; record whole "
            "tensors"
        )
        remarks = [*remarks, ("SAMPLED", f"{survey.n_recorded} of {survey.n_elements} elements were recorded")]
    if survey.strange:
        some = ", ".join(list(survey.strange)[:5])
        remarks = [*remarks, ("PASSED_OVER", f"{len(survey.strange)} tensors are of no known site: {some}")]
    return Recording(
        kind=kind,
        facts=without(_facts(stated, engine, stored, survey), stated.absent, survey.sites, FACTS),
        computed_in=stated.get("dtype"),
        last_layer_known=stated.get("n_layers") is not None,
        prompts=tuple(
            Prompt.probed_at(name, survey.tokens[name], sorted(probed)) for name, probed in survey.probed.items()
        ),
        modes=tuple(mode for mode in Mode if any(item.mode is mode for item in passes)),
        pairs=pairs,
        n_pairs=sum(len(found) - 1 for found in ordered.values()),
        remarks=tuple(remarks),
        gaps=tuple(gaps),
        sampled=sampled,
    )


def _survey(ordered: Mapping[str, Sequence[PassFiles]]) -> _Survey:
    """Read every pass once, for what is to be known before the first pair is compared."""
    survey = _Survey()
    for name, found in ordered.items():
        tokens: tuple[int, ...] | None = None
        for item in found:
            loaded = item.load(tokens)
            tokens = tokens or loaded.trace.tokens
            _note(survey, name, item, loaded)
    if len(survey.rungs) > 1:
        raise AlignmentError(
            f"the prompts are in different dtypes: {survey.rungs}; judge traces of one dtype at a time"
        )
    return survey


def _ordered(found: list[PassFiles]) -> list[PassFiles]:
    """The passes of one prompt, prefill first."""
    rank = {PREFILL: 0, PREFILL_AGAIN: 1, DECODE: 2}
    found = sorted(found, key=lambda item: (rank[item.kind], str(item.mode)))
    if found[0].kind != PREFILL:
        raise AlignmentError(f"{found[0].where} has no prefill of {found[0].prompt!r} to be compared with")
    keys = [(item.kind, item.mode) for item in found]
    if len(set(keys)) < len(keys):
        twice = next(item for item in found if keys.count((item.kind, item.mode)) > 1)
        raise TraceError(f"{twice.where}: {twice.prompt!r} has two passes {twice.kind}")
    return found


def _note(survey: _Survey, name: str, item: PassFiles, loaded: LoadedPass) -> None:
    trace = loaded.trace
    survey.rungs.setdefault(trace.rung, name)
    survey.tokens.setdefault(name, trace.tokens)
    if item.kind == DECODE:
        survey.probed[name].update(_positions(trace))
    survey.layers.update(layer for layer, _ in trace.places() if layer is not None)
    survey.sites.update(site for _, site in trace.places())
    survey.strange.update(dict.fromkeys(loaded.strange))
    survey.n_recorded += loaded.n_recorded
    survey.n_elements += loaded.n_elements


def _pairs(found: list[PassFiles], digits: float) -> Iterator[RecordedPair]:
    if len(found) < 2:
        return
    prefill = found[0].load(None)
    for item in found[1:]:
        loaded = item.load(prefill.trace.tokens)
        positions = _positions(loaded.trace)
        again = item.kind == PREFILL_AGAIN
        if again:
            positions &= _positions(prefill.trace)
        elif positions:
            positions.update(compared_positions(_positions(prefill.trace), positions, loaded.trace.calls))
        mode = item.mode or Mode.AS_DESIGNED
        pair = PassPair(mode, prefill.trace, loaded.trace, tuple(sorted(positions)))
        if positions:
            role = PairRole.SELF_NOISE if again else PairRole.PAIR
            yield RecordedPair(role, pair, unequal=prefill.printed & loaded.printed, digits=digits)


def _positions(trace: Trace) -> set[int]:
    found = {position for record in trace.rows for position in record.positions}
    return found | {position for read in trace.cache for position in read.positions}


def _facts(stated: Stated, engine: str, dtype: str, survey: _Survey) -> EngineFacts:
    highest = max(survey.layers, default=0)
    known = stated.get("n_layers")
    unknown = () if known is not None else (f"number of layers unknown; the highest recorded is {highest}",)
    if known is not None and known <= highest:
        raise TraceError(f"{FACTS} says {known} layers, and layer {highest} was recorded")
    return msgspec.structs.replace(
        stated.facts,
        engine=stated.get("engine") or engine,
        dtype=dtype,
        n_layers=known or highest + 1,
        notes=(*stated.facts.notes, *unknown),
    )
