"""One attention module while it runs: what is recorded of it, and what has been seen of its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kvdrift.engines.base import Sink
from kvdrift.engines.torch.attended import OperandPair
from kvdrift.engines.torch.operands import are_of_rounded
from kvdrift.engines.torch.scored import Scored
from kvdrift.engines.torch.softmax import MOST_SPANS, weighs_keys
from kvdrift.vocabulary.facts import AttentionSpec


@dataclass(slots=True)
class ScoreRows:
    """Scores and probabilities of the probed rows, [row, head, key]; `measured` tells whether the model computed them
    itself or they were derived from the operands of its kernel."""

    scores: Tensor
    probs: Tensor
    measured: bool


@dataclass(frozen=True, slots=True)
class Lane:
    """One recorded row of a batch: which one, the slots of padding before its tokens, and what of it is recorded.

    `row_index` are the places of `positions` among the tokens of the call.
    """

    row: int
    pad: int
    positions: tuple[int, ...]
    row_index: Tensor
    sink: Sink


@dataclass(slots=True)
class Reads:
    """What attention reads: query [row, head, token, dim], key and value [row, kv head, key, dim]; None: not seen."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


@dataclass(slots=True)
class KernelCall:
    """One attention call of torch: what it reads, how it attends and what it gives; None: not seen.

    Attributes:
        reads: its operands; of those that were changed for the positive control, the changed ones.
        spec: how it attends, None where that is not known.
        rows: its probed rows.
        context: what it gives, [row, token, head, dim].
    """

    reads: Reads
    spec: AttentionSpec | None = None
    rows: ScoreRows | None = None
    context: Tensor | None = None


@dataclass(slots=True)
class Frame:
    """One attention module while it runs.

    `at_kernel` says that nothing tells what attention is called with but the calls of torch themselves, which are then
    recorded, and changed for the positive control.
    """

    layer: int
    module: nn.Module
    q_len: int
    lanes: tuple[Lane, ...]
    n_rows: int
    n_heads: int | None
    on_inputs: Callable[[Frame, Reads], None]
    on_context: Callable[[Frame, Tensor], None]
    on_spec: Callable[[Frame, AttentionSpec], None]
    on_plant: Callable[[Frame, Reads], Reads]
    wide: torch.dtype  # dtype in which scores are kept
    want_scores: bool = True
    seen: list[ScoreRows] = field(default_factory=list)
    fallback: Callable[[], ScoreRows | None] | None = None
    derive: Callable[[Tensor, Tensor], ScoreRows | None] | None = None  # the same of another query and other keys
    operands: tuple[Tensor, Tensor, float] | None = None  # query, key and scale that attention was called with
    kernel: str | None = None
    kv_len: int | None = None
    first: int | None = None  # which of the keys is that of the call's first token
    sinks: Tensor | None = None
    spec: AttentionSpec | None = None
    values: Tensor | None = None
    context: Tensor | None = None
    at_kernel: bool = False
    n_products: int = 0  # how many were seen that may be of queries and keys
    made_scores: set[int] = field(default_factory=set)  # which of them made scores, in this call or one like it before
    products: list[OperandPair] = field(default_factory=list)  # those that may be of queries and keys
    scored: Scored | None = None  # what of them the softmax that was seen weighs
    weights: Tensor | None = None  # what that softmax gave, [row, head, token, column]
    softmaxes: list[Tensor] = field(default_factory=list)  # the same of all that were seen since
    weighed: list[Tensor] = field(default_factory=list)  # the values that were taken with these weights so far
    is_unclear: bool = False  # whether products were seen whose softmax weighs none of them
    parts: list[KernelCall] = field(default_factory=list)  # attention calls that were seen at the kernel

    def score_rows(self) -> ScoreRows | None:
        """Return the rows of the one matching softmax or SDPA call; with none or several of them, or one that did not
        weigh the keys, those derived from the arguments of the attention interface."""
        seen = self.seen[0] if len(self.seen) == 1 else None
        if seen is not None and not self._weighs_something_else(seen) and not self._follows_from_rounded(seen):
            return seen
        return self.fallback() if self.fallback is not None else None

    def _follows_from_rounded(self, rows: ScoreRows) -> bool:
        """Whether scores in float32 are those of operands that were rounded once more on the way."""
        derive = self.derive
        if derive is None or self.operands is None or not rows.measured or rows.scores.dtype.itemsize <= 2:
            return False

        def derived(query: Tensor, key: Tensor) -> Tensor | None:
            found = derive(query, key)
            return None if found is None else found.scores

        return are_of_rounded(rows.scores, *self.operands, derived)

    def _weighs_something_else(self, rows: ScoreRows) -> bool:
        """Whether the softmax that was seen is none of the keys, such as one over partial results."""
        keys, columns = self.kv_len, rows.scores.shape[-1]
        values, context = self.values, self.context
        if not rows.measured or self.fallback is None or keys is None or columns == keys > MOST_SPANS:
            return False
        if values is None or context is None or values.ndim != 4 or context.ndim != 4:
            return False
        if values.shape[2] != keys or rows.probs.shape[1] != context.shape[2] or context.shape[2] % values.shape[1]:
            return False
        return not weighs_keys(
            rows.scores,
            rows.probs,
            self._derived,
            [values[lane.row] for lane in self.lanes],
            [context[lane.row][lane.row_index] for lane in self.lanes],
        )

    def _derived(self) -> tuple[Tensor, Tensor] | None:
        """Scores and probabilities that follow from the arguments of the attention interface."""
        derived = None if self.fallback is None else self.fallback()
        return None if derived is None else (derived.scores, derived.probs)
