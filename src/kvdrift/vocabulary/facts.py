"""Facts of an engine, a prompt, a call, a layer's attention and a planted fault.

There is one frozen struct per fact. It is used in memory and, unchanged, in the manifest of a trace directory.
An unknown fact is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import msgspec

from kvdrift.vocabulary.precision import HALF, RUNGS, UNIT_ROUNDOFF, Arithmetic, Roundoffs, Rungs
from kvdrift.vocabulary.sites import Site

OUTSIDE = "outside"  # key of the sites outside the layers


class Plant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fault of the positive control: the tensor of one site is multiplied by `factor` in one layer.

    `layer` is None outside the layers. `slot` is the cached position whose row it is, for a cache site; None elsewhere.
    """

    layer: int | None
    site: Site
    factor: float
    slot: int | None = None


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt and its fixed continuation; the continuation is what is probed."""

    name: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def probed_at(cls, name: str, tokens: Sequence[int], probed: Sequence[int]) -> Self:
        """Return the prompt whose continuation reaches from the first to the last of the ascending positions `probed`.

        If `probed` is empty, all `tokens` are prompt.
        """
        first, last = (probed[0], probed[-1]) if probed else (len(tokens), len(tokens))
        return cls(name, tuple(tokens[:first]), tuple(tokens[first : last + 1]))

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.continuation

    @property
    def probed(self) -> tuple[int, ...]:
        """Positions of the continuation."""
        return tuple(range(len(self.prompt), len(self.tokens)))


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stretch of one row whose values are compared with one plain prefill of `tokens`.

    `choice` says how the token behind each compared position was chosen, if the choice is to be judged; see
    `kvdrift.instruments.choice`. `quantised` is the kind of a cache that quantises its rows; the reference then also
    reads such rows. `n_first` counts the tokens of the first call, whose rows such a cache quantises together.
    `dropped` are tokens that stood behind the first `kept` ones until they were dropped, and the `n_moved` tokens
    behind them moved to their places; what those hold was computed while the dropped ones were seen.
    """

    name: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...] = ()
    choice: str = ""
    quantised: str | None = None
    n_first: int = 0
    dropped: tuple[int, ...] = ()
    kept: int = 0
    n_moved: int = 0


class Passes(msgspec.Struct, forbid_unknown_fields=True):
    """Forward calls that scenarios made, and reference prefills that sharing saved."""

    made: int = 0
    saved: int = 0


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Path proof of one forward call: as observed inside the engine, not as requested.

    `kv_len` is the number of keys that the first attention layer read, None if no attention was seen. `start` is the
    position of the first token fed. Padding on the left of a row of a batch is in the cache too: `cache_len_before` is
    then larger than `start`, and the call that feeds the padding starts below 0. `n_rows` is the number of rows of the
    batch. `overflow` names the first layer, site and position at which float16 ran out of range, None if it did not or
    nobody looked.
    """

    start: int
    q_len: int
    cache_len_before: int
    kv_len: int | None = None
    attention: str = "unknown"
    kernels: tuple[str, ...] = ()
    n_rows: int = 1
    overflow: str | None = None


class AttentionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one layer attends, as it was called.

    Attributes:
        scale: the factor of q·k.
        softcap: scores become softcap * tanh(scores / softcap); None for none.
        window: a token sees itself and the window - 1 tokens before it; None for all tokens.
        sinks: [head], logits that take part in the softmax and have no value; None for none.
        slopes: [head], ALiBi slopes: slope * (position of the key - position of the query) is added to the scores of a
            head (Press et al. 2022, section 3); None for none.
        is_biased: whether something else, unknown, is added to the scores, or some keys belong to no token.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None
    is_biased: bool = False


class EngineFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts about an engine that a trace must carry to be judged elsewhere.

    `dtype` is that of the native run. `rewinds_once` says that a sequence can rewind only once. `sites` maps each layer
    number, as text, to the sites that it offers; the key `OUTSIDE` has the sites outside the layers. `rungs` names the
    two precisions whose drifts separate rounding from a fault, and `pinned` what the finer one cannot lift (see
    `Rungs`). `roundoffs` describes a native precision without a single unit roundoff, such as quantised weights.
    `experts_per_token` is the number of experts that a router chooses. `caveats` says by code what of this model an
    audit says nothing about. `perturbable` says that layer inputs can be changed a little at the finest rung, so that
    its noise is measured and the coarse rung of the ladder is not run.
    """

    engine: str
    model: str
    dtype: str
    n_layers: int
    model_hash: str | None = None
    device: str | None = None
    attention: str | None = None
    cache: str | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    parameters: int | None = None
    can_rewind: bool = True
    why_no_rewind: str | None = None
    rewinds_once: bool = False
    sites: Mapping[str, tuple[Site, ...]] = {}
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = {}
    rungs: tuple[str, str] = msgspec.field(default=(RUNGS.lower, RUNGS.upper), name="ladder")
    pinned: float = 0.0
    roundoffs: Roundoffs | None = None
    experts_per_token: int | None = None
    caveats: Mapping[str, str] = {}
    perturbable: bool = False

    @property
    def ladder(self) -> Rungs:
        """The two rungs of the precision ladder."""
        return Rungs(*self.rungs, pinned=self.pinned)

    @property
    def autocast(self) -> str | None:
        """The dtype that products of the native run are computed in, if the engine says that it is not `dtype`."""
        if self.roundoffs is None or "COMPUTED_IN" not in self.caveats:
            return None
        return next((name for name in HALF if UNIT_ROUNDOFF[name] == self.roundoffs.product), None)

    @property
    def arithmetic(self) -> Arithmetic:
        """How the native run rounds."""
        return Arithmetic(self.dtype, self.roundoffs)


def encoded_name(field: str) -> str:
    """Return the name that a field of `EngineFacts` has in a manifest."""
    return next(item.encode_name for item in msgspec.structs.fields(EngineFacts) if item.name == field)


def is_absent(facts: EngineFacts, site: Site) -> bool:
    """Whether it is known that no layer of a model has a site, and nothing outside them."""
    return bool(facts.sites) and not any(site in found for found in facts.sites.values())


def sites_by_layer(offered: Mapping[int | None, Sequence[Site]]) -> dict[str, tuple[Site, ...]]:
    """Return the sites that an engine offers, in the form of `EngineFacts.sites`."""
    return {OUTSIDE if layer is None else str(layer): tuple(sites) for layer, sites in offered.items()}
