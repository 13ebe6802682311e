"""What is planted in llama.cpp: a fault or a clean twin, and what they need to know of a file and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role
from kvdrift_bench.planted.facts import FaultFacts, Tally, TwinFacts, anywhere
from kvdrift_bench.planted.llamacpp.ways import Spot

# Tokens that are fed to see the graph of a step: more than the windows of tiny models hold.
_SURVEY = 16


@dataclass
class Grounds:
    """The graph of one decode step of a file as it is run: whether attention is fused, names and operations by layer,
    which layers see a part of the keys, which are capped or have sinks, how many heads share keys."""

    n_layers: int
    kv_name: str
    flash: bool = False
    nodes: dict[int | None, set[str]] = field(default_factory=dict)
    sliding: set[int] = field(default_factory=set)
    full: set[int] = field(default_factory=set)
    capped: bool = False
    sinks: bool = False
    group: int = 1

    def has(self, name: str) -> bool:
        """Whether some layer, or the part outside of them, has a node of this name."""
        return any(name in names for names in self.nodes.values())


Applies = Callable[[Grounds], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaFault(FaultFacts):
    """A bug that is committed on decode steps of llama.cpp.

    Attributes:
        hook: makes what is planted, which counts in the tally that it is given.
        fault_layer: the layer that faults of one layer are planted in.
        applies: says why a file cannot carry it, None if it can.
    """

    hook: Callable[[Tally], Faultless]
    fault_layer: int
    applies: Applies = anywhere

    def plant(self, tally: Tally) -> Faultless:
        """Return what an engine takes as its `fault`; `tally` counts how often it was committed."""
        tally.fault_layer = self.fault_layer
        return self.hook(tally)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaTwin(TwinFacts):
    """A harmless change of llama.cpp. Attributes as those of `LlamaFault`."""

    hook: Callable[[Tally], Faultless]
    applies: Applies = anywhere

    def plant(self, tally: Tally) -> Faultless:
        """Return what an engine takes as its `fault`."""
        return self.hook(tally)


class _Surveyor(Faultless):
    """Takes note of the graph of a step."""

    def __init__(self, grounds: Grounds) -> None:
        self._grounds = grounds

    def watches(self, call: Fed) -> bool:
        return len(call.members) == 1

    def after(self, node: Tensor, role: Role | None, call: Fed) -> None:
        if not self.watches(call):
            return
        spot, grounds = Spot(node, call, Tally()), self._grounds
        grounds.nodes.setdefault(spot.layer, set()).update({spot.base, node.op})
        mask = spot.mask
        if mask is not None and spot.layer is not None:
            seen = int((mask.values()[0, 0, 0, : spot.position + 1] == 0).sum())
            (grounds.sliding if seen < spot.position + 1 else grounds.full).add(spot.layer)
            grounds.sinks |= node.source(2 if spot.kind == "softmax" else 4) is not None
        if spot.kind == "flash":
            grounds.flash = True
            grounds.capped |= node.parameter(2) != 0.0
            grounds.group = spot.source(0).shape[1] // spot.source(1).shape[1]
        elif spot.kind == "scores" and spot.base == "kq":
            grounds.group = spot.source(1).shape[1] // spot.source(0).shape[1]
        grounds.capped |= spot.base == "kq_tanh"


def survey(engine: LlamaCppEngine, tokens: Sequence[int] | None = None) -> Grounds:
    """Feed a few tokens and one step to an open engine that nothing is planted in, and return what its graph shows.

    Raises:
        CaptureError: llama.cpp failed.
    """
    grounds = Grounds(engine.info.n_layers, engine.kv_type)
    ids = tuple(tokens or (token % (engine.info.vocab_size or 2) for token in range(1, _SURVEY + 1)))
    with engine.planted(_Surveyor(grounds)):
        sequence = engine.new_sequence(len(ids))
        sequence.extend(ids[:-1])
        sequence.extend(ids[-1:])
        sequence.close()
    return grounds
