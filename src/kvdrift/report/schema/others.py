"""The machine form of what is no report of tensors: servers, diffs, determinism, scenarios, inventories."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvdrift.report.schema.structs import CaveatView, Figure, Version, Whole
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site


class ServerReport(msgspec.Struct, kw_only=True):
    """What `audit`, `show` and `gate` print of a server; keys beside these may be there."""

    schema_version: Version
    kind: Literal["server"]
    created: str
    model: str
    verdict: Verdict
    exit_code: int
    conclusion: str
    first_failure: dict[str, Any] | None
    diagnosis: str | None
    reasons: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    recommendations: list[str]
    caveats: list[CaveatView]
    coverage: dict[str, Any]
    environment: dict[str, Any]


class LogprobReport(msgspec.Struct, kw_only=True):
    """What `compare` and `show` print of two dumps of logprobs; keys beside these may be there."""

    schema_version: Version
    report: Literal["compare-logprobs"]
    created: str
    verdict: Verdict
    conclusion: str
    about: str
    reasons: list[Any]
    first_failure: dict[str, Any] | None
    cause: dict[str, Any] | None
    guilty: dict[str, Any] | None
    along: list[dict[str, Any]]
    recommendations: list[str]
    caveats: list[dict[str, Any]]
    environment: dict[str, Any]


class PlaceInMap(Whole):
    """Where two passes part beyond rounding."""

    layer: int | None
    site: Site
    text: str


class MapCellView(Whole):
    """A place of two passes: largest relative difference, what rounding may make of it, their ratio, and where."""

    layer: int | None
    site: Site
    state: Literal["equal", "within", "beyond", "convention"]
    drift: Figure
    bound: Figure
    excess: Figure
    n: int
    n_equal: int
    worst: str


class DriftMapView(Whole):
    """All places of two passes, in forward order."""

    what: str
    first: PlaceInMap | None
    cells: list[MapCellView]


class PartingView(Whole):
    """The first place at which two passes differ by more than both round."""

    what: str
    address: str
    size: Figure
    bound: Figure
    text: str


class WeightsView(Whole):
    """Whether A and B have the same weights: by hash, and by `n_rows` rows of the embedding. None is not known."""

    same: bool | None
    text: str
    n_rows: int
    drift: Figure | None


class ComparedSide(Whole):
    """One of the two engines; `rung` is the precision that it was compared at."""

    engine: str
    model: str
    dtype: str
    rung: str
    model_hash: str | None
    noise_measured: bool
    versions: dict[str, str]


class ComparedEnvironment(Whole):
    """What was compared, and how it is done again."""

    kvdrift: str
    command: str | None
    sides: dict[Literal["A", "B"], ComparedSide]


class CompareText(Whole):
    """A sentence about a comparison; `name` is that of a cause."""

    text: str
    name: str | UnsetType = UNSET


class EnginesReport(Whole):
    """What `compare` and `show` print of two engines, or of two directories of their traces."""

    schema_version: Version
    report: Literal["compare-engines"]
    created: str
    verdict: Verdict
    exit_code: int
    conclusion: str
    about: str
    reasons: list[str]
    first_failure: CompareText | None
    guilty: Literal["A", "B"] | None
    guilty_pass: Literal["prefill", "decode"] | None
    cause: CompareText | None
    partings: list[PartingView]
    n_layers: int
    maps: list[DriftMapView]
    conventions: list[str]
    unmatched: list[str]
    minimum: Figure
    native: Figure | None
    weights: WeightsView
    recommendations: list[str]
    caveats: list[CaveatView]
    settings: dict[str, list[str]]
    environment: ComparedEnvironment


class DiffView(Whole):
    """What `diff` prints: what separates run B from run A. `why_not` says why drift was not compared by place."""

    schema_version: Version
    facts: list[str]
    verdicts: list[Verdict]
    worse: list[str]
    better: list[str]
    changed: list[str]
    n_units: int
    why_not: str | None
    alpha: float
    exit_code: int


class ScenarioView(Whole):
    """What `scenarios` prints is a list of these: a route to a token, what it can find, and where it applies."""

    name: str
    finds: str
    where: str


class SchemaView(Whole):
    """What `schema` prints is a list of these: a schema, and the verbs and files that it is of."""

    name: str
    of: str
    version: Version


class FindingView(Whole):
    """Something that is there or missing, and what its absence costs."""

    what: str
    found: str
    is_there: bool
    cost: str


class InventoryView(Whole):
    """What `trace check` prints: what a directory of traces holds, and what stands in the way of a pass."""

    schema_version: Version
    kind: str
    facts: dict[str, str]
    findings: list[FindingView]
    chains: dict[str, str]
    obstacles: list[str]
    scope: str | None


class ChangedView(Whole):
    """A run, or a row of a batch, that differs from its standard, and the first value in forward order that does."""

    where: str
    n_pairs: int
    n_differ: int
    size: Figure
    ulp: Figure
    layer: int | None
    site: Site | None
    position: int | None


class GroupView(Whole):
    """All runs, or all rows of a batch; sizes are relative, the largest of all values."""

    name: str
    n: int
    state: Literal["bit-identical", "jitter", "different", "unclear"]
    size: Figure
    size_at_finest: Figure | None
    why: str | None
    text: str
    changed: list[ChangedView]


class ClaimView(Whole):
    """A mode that was claimed, and what the tensors say of it."""

    claim: str
    answer: Literal["in effect", "not in effect", "cannot tell"]
    why: str


class DeterminismView(Whole):
    """What `determinism` prints."""

    schema_version: Version
    model: str
    engine: str
    dtype: str
    n_runs: int
    exit_code: int
    groups: list[GroupView]
    claims: list[ClaimView]


CellStateName = Literal["PASS", "FAIL", "INCONCLUSIVE", "ERROR", "NOT_APPLICABLE", "MISSING"]


class SweepCellView(Whole):
    """A declared cell of a sweep. None on an axis is the engine's own default; `report` is relative to the sweep."""

    id: str
    model: str
    engine: str
    dtype: str | None
    attention: str | None
    cache: str | None
    scenario: str
    prompt: str | None
    lengths: str | None
    seed: int
    state: CellStateName
    verdict: str | None
    first_failure: str | None
    cause: str | None
    reasons: list[str]
    report: str | None
    seconds: float | None


class ZooRowView(Whole):
    """What became of one type of the zoo.

    Attributes:
        type: name in the registry.
        scenarios: what was asked for beside plain decode; those that apply are in `verdicts`.
        transformers: its version.
        engine: whose registry it is of.
        mlx_lm: version of mlx-lm; None for types of transformers.
        state: verdict of plain decode, or NOT_APPLICABLE (there is no decode step on a cache to audit), or ERROR.
        parameters: of the tiny model.
        cache: class of the cache that its own `forward` returns; None if it returns none. Of mlx-lm: the classes of the
            caches that it makes.
        verdicts: by scenario.
        first_failure: of plain decode.
        excess: largest difference of decode over what rounding explains, as its row of scenarios has it.
        reason: why there is no verdict, or why scenarios are missing.
        seconds: for all of it.
    """

    type: str
    scenarios: list[str]
    transformers: str
    state: str
    parameters: int | None = None
    cache: str | None = None
    verdicts: dict[str, Verdict] = msgspec.field(default_factory=dict)
    first_failure: str | None = None
    excess: float | None = None
    reason: str | None = None
    seconds: float = 0.0
    engine: Literal["hf", "mlx"] = "hf"
    mlx_lm: str | None = None


class ZooView(Whole):
    """What `zoo` prints: a row for each type, in the order asked for."""

    schema_version: Version
    kind: Literal["zoo"]
    versions: dict[str, str]
    scenarios: list[str]
    counts: dict[str, int]
    exit_code: int
    rows: list[ZooRowView]


class SweepView(Whole):
    """What `sweep` prints, and summary.json. `alpha` is for the whole sweep, `alpha_of_a_cell` what an audit had."""

    schema_version: Version
    kind: Literal["sweep"]
    name: str
    created: str
    verdict: Literal["PASS", "FAIL", "INCOMPLETE", "INCONCLUSIVE"]
    exit_code: int
    reasons: list[str]
    alpha: float
    alpha_of_a_cell: float
    counts: dict[CellStateName, int]
    cells: list[SweepCellView]
    version: str
