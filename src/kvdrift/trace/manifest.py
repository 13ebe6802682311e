"""The index of a directory of traces, as msgspec structs: what `manifest.json` may hold, and nothing else."""

from __future__ import annotations

import msgspec

from kvdrift.vocabulary.facts import AttentionSpec, Call, EngineFacts, Passes, Plant, Prompt, Segment
from kvdrift.vocabulary.plan import AuditPlan, Mode, PairRole

FORMAT_VERSION = 1
# History of the format:
#   1  first version


class RecordEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """One record of a trace file; `tensor` names its values, `slots` and `stored` the index tensors beside them.

    A record that holds a part of its tensor says which: `heads` or `columns` [first, stop), and the `rank` that had it.
    With a `rank` alone it is an addend of a sum.
    """

    tensor: str
    site: str
    layer: int | None
    positions: list[int]
    slots: str | None = None
    stored: str | None = None
    rank: int | None = None
    heads: list[int] | None = None
    columns: list[int] | None = None


class ProductEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One product of a trace file, by the tensors of its exact result; no `values`: they are those of its site.

    One whose weight cannot be known has neither `reference` nor `spread`, and `note` says why.
    """

    site: str
    layer: int | None
    name: str
    positions: list[int]
    reference: str | None = None
    spread: str | None = None
    values: str | None = None
    note: str | None = None


class LayerAttention(AttentionSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the layer `layer` attends."""

    layer: int

    @classmethod
    def of(cls, layer: int, spec: AttentionSpec) -> LayerAttention:
        """Return the entry of a layer."""
        return cls(layer=layer, **msgspec.structs.asdict(spec))

    @property
    def spec(self) -> AttentionSpec:
        """How the layer attends, without its number."""
        return AttentionSpec(**{name: getattr(self, name) for name in AttentionSpec.__struct_fields__})


class TraceEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One pass: its file, the checksum of the file, and what is in it."""

    name: str
    file: str
    sha256: str
    prompt: str
    pass_name: str
    label: str
    rung: str
    tokens: list[int]
    calls: list[Call]
    records: list[RecordEntry]
    attention: list[LayerAttention] = []
    products: list[ProductEntry] = []


class PairEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Two traces, by name, that are compared at `positions`; `role` is that of a recorded pair, `shift` its shift.

    In a pair of a `scenario` the prompt is that of the decode trace, since several scenarios share one prefill. The
    self-noise that all of them share has the scenario "*".
    """

    role: PairRole
    mode: Mode
    prompt: str
    rung: str
    prefill: str
    decode: str
    positions: list[int]
    scenario: str | None = None
    shift: float = 0.0


class ScenarioEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A scenario of the run: what it compared, or why it did not apply, or how it failed."""

    name: str
    finds: str
    segments: tuple[Segment, ...] = ()
    not_applicable: str | None = None
    failure: str | None = None
    plant: Plant | None = None


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Everything about a run that is not a tensor."""

    format_version: int
    created: str
    command: str | None
    engine: EngineFacts
    plan: AuditPlan
    prompts: list[Prompt]
    plant: Plant | None
    failures: dict[str, str]
    traces: list[TraceEntry]
    pairs: list[PairEntry]
    scenarios: list[ScenarioEntry] = []
    has_decode: bool = True
    passes: Passes | None = None
    plants: list[Plant] = []  # faults of the positive control beside `plant`, in the order of their pairs
    specification: bool = False  # whether every prompt has a prefill at float64 on the native layer inputs
    unobserved: tuple[str, ...] = ()  # the rungs at which the longest prompt also ran unobserved
