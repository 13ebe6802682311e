"""What is known of an engine, a prompt, a call, a layer's attention and a planted fault: one struct for each fact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvdrift.vocabulary.precision import RUNGS, Roundoffs, Rungs
from kvdrift.vocabulary.sites import Site


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its fixed continuation; the continuation is what is probed."""

    name: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.continuation

    @property
    def probed(self) -> tuple[int, ...]:
        """Positions of the continuation."""
        return tuple(range(len(self.prompt), len(self.tokens)))


@dataclass(slots=True)
class Segment:
    """A stretch of one row whose values are compared with one plain prefill of `tokens`.

    `choice` says how the token behind each compared position was chosen, if that is to be judged; see
    `kvdrift.instruments.choice`.
    """

    name: str
    tokens: tuple[int, ...]
    positions: list[int] = field(default_factory=list)
    choice: str = ""
    quantised: str | None = None  # the kind of cache, if it quantises its rows: the reference then reads such rows too
    n_first: int = 0  # tokens of the first call, whose rows a quantised cache quantises together


@dataclass(frozen=True, slots=True)
class Plant:
    """The fault of the positive control: the tensor of one site is multiplied by `factor` in one layer."""

    layer: int
    site: Site
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Facts about an engine that a trace must carry to be judged elsewhere.

    `rewinds_once` says that a sequence can go back one time only. `sites` maps each layer number to the sites that it
    offers; key None holds the sites outside the layers. `rungs` are the dtypes that `Engine.at` accepts; `ladder` are
    the two of them whose drifts tell rounding from a fault. `roundoffs` describes a native precision that is no dtype
    of one unit roundoff, such as quantised weights. `experts_per_token` is how many experts a router takes. A fact that
    is not known is None.
    """

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
    why_no_rewind: str | None = None
    rewinds_once: bool = False
    rungs: tuple[str, ...] = ()
    ladder: Rungs = RUNGS
    experts_per_token: int | None = None
    roundoffs: Roundoffs | None = None
    sites: Mapping[int | None, tuple[Site, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """Path proof of one forward call, as observed inside the engine and not as it was asked for.

    `kv_len` is the number of keys that the first attention layer read, None if no attention was seen. `start` is the
    position of the first token fed. Padding on the left of a row of a batch lies in the cache as well: there
    `cache_len_before` is larger than `start`, and the call that feeds the padding starts below 0.
    """

    start: int
    q_len: int
    cache_len_before: int
    kv_len: int | None
    attention: str
    kernels: tuple[str, ...]
    n_rows: int = 1  # of the batch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How one layer attends, as it was called.

    Attributes:
        scale: what q·k is multiplied by.
        softcap: scores become softcap * tanh(scores / softcap); None for none.
        window: a token sees itself and the window - 1 tokens before it; None for all of them.
        sinks: one logit a head that takes part in the softmax and has no value; None for none.
        slopes: one ALiBi slope a head: slope * (position of the key - position of the query) is added to its scores
            (Press et al. 2022, section 3); None for none.
        is_biased: something else is added to the scores, or keys that belong to no token are seen beside those of the
            tokens; nothing more is known of it.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None
    is_biased: bool = False
