"""The index of a directory of traces, as msgspec structs: what `manifest.json` may hold, and nothing else."""

from __future__ import annotations

import msgspec

FORMAT_VERSION = 1
# History of the format:
#   1  first version


class CallEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Path proof of one forward call."""

    start: int
    q_len: int
    cache_len_before: int
    kv_len: int | None
    attention: str
    kernels: list[str]
    n_rows: int = 1


class RecordEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One record of a trace file; `tensor` names its values, `slots` and `stored` the index tensors beside them."""

    tensor: str
    site: str
    layer: int | None
    positions: list[int]
    slots: str | None = None
    stored: str | None = None


class AttentionEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How one layer attends; see `kvdrift.vocabulary.facts.AttentionSpec`."""

    layer: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: list[float] | None = None
    slopes: list[float] | None = None
    is_biased: bool = False


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
    calls: list[CallEntry]
    records: list[RecordEntry]
    attention: list[AttentionEntry] = []


class PairEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Two traces, by name, that are compared at `positions`; `role` is pair, self_noise or control.

    In a pair of a `scenario` the prompt is that of the decode trace, since several scenarios share one prefill. The
    self-noise that all of them share has the scenario "*".
    """

    role: str
    mode: str
    prompt: str
    rung: str
    prefill: str
    decode: str
    positions: list[int]
    scenario: str | None = None


class PlantEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The fault of the positive control."""

    layer: int
    site: str
    factor: float


class PromptEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A prompt and its continuation."""

    name: str
    prompt: list[int]
    continuation: list[int]


class EngineEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Facts about the engine; see `kvdrift.vocabulary.facts.EngineFacts`. A fact that is not known is null."""

    engine: str
    model: str
    model_hash: str | None
    dtype: str
    device: str | None
    attention: str | None
    cache: str | None
    n_layers: int
    vocab_size: int | None
    max_positions: int | None
    parameters: int | None
    can_rewind: bool
    why_no_rewind: str | None
    sites: dict[str, list[str]]
    notes: list[str]
    versions: dict[str, str]
    ladder: tuple[str, str] = ("float32", "float64")
    pinned: float = 0.0
    roundoffs: dict[str, float] | None = None
    experts_per_token: int | None = None


class PlanEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The options of the run."""

    mode: str
    span: int
    layers: list[int] | None
    alpha: float
    seed: int
    ladder: str = "model"
    lengths: list[int] | None = None


class SegmentEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A stretch of one row of a scenario, where it is compared, and how its tokens were chosen if that is judged."""

    name: str
    tokens: list[int]
    positions: list[int]
    choice: str = ""
    quantised: str | None = None  # the kind of cache, if it quantises its rows
    n_first: int = 0  # tokens of the first call, whose rows are quantised together


class ScenarioEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A scenario of the run: what it compared, or why it did not apply, or how it failed."""

    name: str
    finds: str
    segments: list[SegmentEntry] = []
    not_applicable: str | None = None
    failure: str | None = None
    plant: PlantEntry | None = None


class PassesEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How many forward passes scenarios have made, and how many they were spared by shared prefills."""

    made: int
    saved: int


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Everything about a run that is not a tensor."""

    format_version: int
    created: str
    command: str | None
    engine: EngineEntry
    plan: PlanEntry
    prompts: list[PromptEntry]
    plant: PlantEntry | None
    failures: dict[str, str]
    traces: list[TraceEntry]
    pairs: list[PairEntry]
    scenarios: list[ScenarioEntry] = []
    has_decode: bool = True
    passes: PassesEntry | None = None
    specification: bool = False  # whether every prompt has a prefill at float64 on the native layer inputs
