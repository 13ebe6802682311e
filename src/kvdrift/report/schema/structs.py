"""The machine form of every verb's `--json`, as types: their JSON Schemas lie beside this file.

A figure that JSON cannot hold is one of the strings "nan", "inf" and "-inf". A key that is not always there is `UNSET`
by default; every other key is always there. A change that takes a key away or gives it another meaning raises
`SCHEMA_VERSION` of `kvdrift.report.view`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Kind, Side, Verdict
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.shapes import Extent, Pass, Relation
from kvdrift.vocabulary.sites import Site

Figure = float | Literal["nan", "inf", "-inf"]
State = Literal["equal", "within", "unknown", "beyond", "first"]
Version = Annotated[int, msgspec.Meta(ge=1)]


class Whole(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An object that has these keys and no others."""


class AddressView(Whole):
    """An address; `text` is the whole of it, `slot` the cached position that drifts most there."""

    prompt: str
    position: int
    layer: int | None
    site: Site
    slot: int | None
    text: str


class ShapeView(Whole):
    """The shape of an error: see `kvdrift.vocabulary.shapes.ErrorShape`."""

    extent: Extent
    heads: list[int]
    elements: list[int] | None
    slots: list[int]
    relation: Relation
    size: Figure | None
    explained: Figure
    positions: list[int]
    guilty: Pass | None
    text: str


class RunnerUp(Whole):
    """A cause that explains less."""

    cause: Cause
    explained: Figure
    text: str


class DiagnosisView(Whole):
    """The cause that reproduces a mismatch, and the share of it that it explains."""

    cause: Cause
    explained: Figure
    text: str
    slots: list[int]
    shape: ShapeView | None
    runners_up: list[RunnerUp] | UnsetType = UNSET


class ModeView(Whole):
    """The conclusion of one mode, and counts of its pairs."""

    status: Literal["PASS", "FAIL", "INCONCLUSIVE", "ERROR", "NOT RUN"]
    verdict: Verdict | None
    kind: Kind | None
    first_failure: AddressView | None
    n_pairs: int
    n_exact: int
    n_within: int
    n_beyond: int
    n_unpaired: int
    reasons: list[str]


class MarkView(Whole):
    """A column of the model, "embedding", a layer or "head", and how far its tensors are apart."""

    name: str
    state: State
    excess: Figure | None


class ProjectionView(Whole):
    """A projection of one layer, prompt and mode; the hashes are of its first probed position."""

    mode: str
    tensor: str
    layer: int | None
    prompt: str
    position: int
    sha256_prefill: str | None
    sha256_decode: str | None
    n_positions: int
    n_exact: int
    max_ulp: Figure
    max_rel_l2: Figure
    excess: Figure | None


class StatView(Whole):
    """Smallest, largest and mean value over `n` visible keys."""

    min: Figure | None
    max: Figure | None
    mean: Figure | None
    n: int


class StatsView(Whole):
    """Statistics of one site and pass, by layer and in all."""

    layers: dict[str, StatView]
    all: StatView


class AlignedRows(Whole):
    """Whether the rows of K, or of V, that decode reads are those that prefill wrote; null where it is not known."""

    n_reads: int
    bitwise: bool | None
    within_noise: bool | None
    n_exact: int
    n_bad_slots: int
    n_lost_slots: int
    max_excess: Figure | None


class AlignedBoth(Whole):
    """Whether both K and V are aligned."""

    bitwise: bool | None
    within_noise: bool | None


class AlignmentView(Whole):
    """The alignment of K, of V and of both."""

    aligned: AlignedBoth
    k: AlignedRows | UnsetType = UNSET
    v: AlignedRows | UnsetType = UNSET


class EvidenceRow(Whole):
    """A row of the evidence table."""

    evidence: str
    statistic: str
    supports_h0: bool
    supports_h1: bool
    against_the_run: bool
    enables_a_verdict: bool
    measured: bool


class Hypotheses(Whole):
    """Both hypotheses, the evidence for each, and the conclusion."""

    h0: str
    h1: str
    alpha: float
    evidence: list[EvidenceRow]
    conclusion: str


class EvidenceView(Whole):
    """What one instrument saw in one mode: see `kvdrift.vocabulary.evidence.Evidence`."""

    instrument: str
    mode: str | None
    statistic_name: str
    statistic: Figure | None
    bound: Figure | None
    p_value: Figure | None
    supports: Side | None
    valid: bool
    reason: str | None
    minimum_detectable: Figure | None
    text: str
    detail: dict[str, Any]


class CaveatView(Whole):
    """A limit of the verdict; `code` is stable, `text` is for people."""

    code: str
    text: str


class ChainLayers(Whole):
    """Layers that are alike: which links of the chain were compared in them."""

    first: int
    last: int
    sites: dict[str, Literal["yes", "no", "absent"]]


class ChainView(Whole):
    """The chain of recorded sites from the cache to the logits, of these modes."""

    modes: list[str]
    layers: list[ChainLayers]
    outside: dict[str, Literal["yes", "no", "absent"]]
    whole: bool
    holds_up_to: str | None
    missing: str | None


class PromptView(Whole):
    """A prompt: its length, and the tokens behind it that were probed."""

    id: str
    n_tokens: int
    span: int
    continuation: list[int]


class RouteView(Whole):
    """Proof of the routes that the passes of a prompt took."""

    mode: str
    rung: str
    prompt: str
    proof: bool
    problems: list[str]
    prefill: list[Call]
    decode: list[Call]


class CoverageView(Whole):
    """What was compared, and what was not."""

    sites_recorded: dict[str, int]
    only_recorded: bool
    sites_not_offered: list[Site]
    sites_in_some_layers_only: list[Site]
    n_layers: int
    n_layers_recorded: int
    chains: list[ChainView]
    prompts: list[PromptView]
    n_pairs: dict[str, int]
    n_unpaired: int
    rungs: list[str]
    rungs_failed: dict[str, str]
    routes: list[RouteView]


class PlanView(Whole):
    """What was asked for."""

    mode: str
    ladder: str
    span: int
    layers: list[int] | None
    alpha: float
    seed: int
    lengths: list[int] | None


class EnvironmentView(Whole):
    """The model, the engine and the plan; null for what is not known."""

    engine: str
    model: str
    model_hash: str | None
    dtype: str
    device: str | None
    attention: str | None
    cache: str | None
    parameters: int | None
    versions: dict[str, str]
    notes: list[str]
    plan: PlanView
    command: str | None


class ModeOfLength(Whole):
    """One mode at one length."""

    verdict: Verdict
    n_pairs: int
    n_exact: int
    n_beyond: int
    largest_drift: Figure | None
    largest_drift_at: str | None
    worst_excess: Figure | None


class LengthRow(Whole):
    """One length of a sweep."""

    length: int
    prompt: str
    verdict: Verdict
    first_failure: str | None
    self_noise: Figure | None
    kernel_prefill: str | None
    kernel_decode: str | None
    modes: dict[str, ModeOfLength]
    reasons: list[str]


class BoundaryView(Whole):
    """Where decode begins, or ceases, to behave differently."""

    change: str
    axis: str
    before: int
    after: int
    exact: bool
    rises: bool
    modes: list[str]
    sites: list[str]
    first: str | None
    narrow: str | None
    text: str
    ends: int | UnsetType = UNSET


class LengthsView(Whole):
    """A sweep over lengths."""

    span: int
    rows: list[LengthRow]
    boundaries: list[BoundaryView]
    pooled: list[str]
    untested: str | None


class ScenarioRow(Whole):
    """A scenario of an audit: its verdict, or why it did not apply."""

    name: str
    finds: str
    applicable: bool
    verdict: Verdict | None
    kind: Kind | None
    first_failure: str | None
    about: str | None
    worst_excess: Figure | None
    n_pairs: int
    diagnosis: DiagnosisView | None
    reasons: list[str]
    choices: list[Any]
    rows: list[str]


class PassesView(Whole):
    """Forward passes of scenarios."""

    made: int
    saved: int


class Report(Whole):
    """What `audit`, `judge`, `show` and `gate` print of tensors, and report.json holds."""

    schema_version: Version
    created: str
    model: str
    verdict: Verdict
    kind: Kind | None
    scope: str | None
    exit_code: int
    first_failure: AddressView | None
    diagnosis: DiagnosisView | None
    reasons: list[str]
    lengths: LengthsView | None
    strip: list[MarkView]
    modes: dict[str, ModeView]
    projection_hashes: list[ProjectionView]
    attention_stats: dict[str, dict[str, dict[str, StatsView]]]
    kv_alignment: dict[str, AlignmentView]
    about: str
    hypotheses: Hypotheses
    recommendations: list[str]
    instruments: list[EvidenceView]
    coverage: CoverageView
    caveats: list[CaveatView]
    environment: EnvironmentView
    leading_scenario: str | UnsetType = UNSET
    scenarios: list[ScenarioRow] | UnsetType = UNSET
    longest_row: int | UnsetType = UNSET
    forward_passes: PassesView | UnsetType = UNSET
