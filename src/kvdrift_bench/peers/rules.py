"""Every peer's rule with its default threshold: what it says of a run, and what it would say at any threshold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.peers import statistics as stat
from kvdrift_bench.peers.tensors import PairedTensor, in_forward_order

Direction = Literal["above", "below"]
Group = Callable[[list[PairedTensor]], tuple[float, PairedTensor]]
# gretacore wants the same most likely token at this share of the positions.
_TOP1_SHARE = 0.999


@dataclass(frozen=True, slots=True)
class Score:
    """The statistic of one tensor."""

    tensor: PairedTensor
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one peer decides.

    Attributes:
        name: unique, `tool_rule`.
        source: the tool, and where the rule is written down.
        formula: the statistic and when it flags, for the reader.
        threshold: the peer's own constant.
        direction: on which side of the threshold a tensor is flagged.
        statistic: the statistic of one tensor; None for a rule over several of them.
        over_group: the statistic of all tensors of one layer and site.
        logits_only: whether it looks at the logits alone.
        needs_reference: whether it needs the same values at float64.
    """

    name: str
    source: str
    formula: str
    threshold: float
    direction: Direction = "above"
    statistic: Callable[[PairedTensor], float] | None = None
    over_group: Group | None = None
    logits_only: bool = False
    needs_reference: bool = False

    def flags(self, value: float) -> bool:
        """Whether the peer calls this statistic a failure; NaN is one."""
        return not (value <= self.threshold if self.direction == "above" else value >= self.threshold)

    def alarm(self, value: float) -> float:
        """The statistic turned so that larger is worse."""
        if math.isnan(value):
            return math.inf
        return value if self.direction == "above" else -value

    def scores(self, tensors: Sequence[PairedTensor]) -> list[Score]:
        """Return the statistics of a run, in the order of `tensors`; empty if this rule cannot be applied to it."""
        seen = [tensor for tensor in tensors if not self.logits_only or tensor.site is Site.LOGITS]
        if self.needs_reference:
            seen = [tensor for tensor in seen if tensor.reference is not None]
        if self.over_group is not None:
            return self._grouped(seen, self.over_group)
        assert self.statistic is not None
        worst = math.inf if self.direction == "above" else -math.inf
        return [Score(tensor, worst if tensor.is_broken else self.statistic(tensor)) for tensor in seen]

    def _grouped(self, tensors: Sequence[PairedTensor], group: Group) -> list[Score]:
        places: dict[tuple[int | None, Site], list[PairedTensor]] = defaultdict(list)
        for tensor in tensors:
            places[tensor.layer, tensor.site].append(tensor)
        scores = []
        for members in places.values():
            broken = next((tensor for tensor in members if tensor.is_broken), None)
            value, where = (math.inf, broken) if broken is not None else group(members)
            scores.append(Score(where, value))
        return scores


@dataclass(frozen=True, slots=True)
class PeerOutcome:
    """What one rule says of one run.

    `steps` are the tensors at which the alarm, see `Rule.alarm`, rises above all before it in forward order: at any
    threshold, the first flagged tensor is the first of them beyond it. None if the rule could not be applied.
    """

    rule: str
    flagged: bool
    first: PairedTensor | None
    steps: tuple[tuple[PairedTensor, float], ...] | None


def judge_by_peers(
    tensors: Iterable[PairedTensor], prompts: Sequence[str], rules: Sequence[Rule] | None = None
) -> list[PeerOutcome]:
    """Return what every rule says of the tensors of one run."""
    ordered = in_forward_order(tensors, prompts)
    return [_judge(rule, ordered) for rule in (RULES if rules is None else rules)]


def _judge(rule: Rule, ordered: Sequence[PairedTensor]) -> PeerOutcome:
    scores = rule.scores(ordered)
    if not scores:
        return PeerOutcome(rule.name, False, None, None)
    flagged = [score.tensor for score in scores if rule.flags(score.value)]
    if rule.name == GRETACORE_GATE:
        flagged += _other_choices(ordered)
    steps: list[tuple[PairedTensor, float]] = []
    highest = -math.inf
    for score in scores:
        alarm = rule.alarm(score.value)
        if alarm > highest:
            highest = alarm
            steps.append((score.tensor, alarm))
    return PeerOutcome(rule.name, bool(flagged), next(iter(flagged), None), tuple(steps))


def _other_choices(tensors: Sequence[PairedTensor]) -> list[PairedTensor]:
    logits = [tensor for tensor in tensors if tensor.site is Site.LOGITS]
    others = [tensor for tensor in logits if stat.chooses_another_token(tensor)]
    return others if 1.0 - len(others) / max(1, len(logits)) < _TOP1_SHARE else []


def _mean_k3(tensors: list[PairedTensor]) -> tuple[float, PairedTensor]:
    """The mean over all tokens that are followed by a known one, and the token with the largest share in it."""
    values = [(stat.k3(tensor), tensor) for tensor in tensors if tensor.next_token is not None]
    if not values:
        return 0.0, tensors[0]
    return sum(value for value, _ in values) / len(values), max(values, key=lambda item: item[0])[1]


def _worst_first_mismatch(tensors: list[PairedTensor]) -> tuple[float, PairedTensor]:
    """The rank at the first position of each prompt where another token is chosen, the worst over prompts."""
    worst, where = 1.0, tensors[0]
    met: set[str] = set()
    for tensor in sorted(tensors, key=lambda item: item.position):
        if tensor.prompt not in met and stat.chooses_another_token(tensor):
            met.add(tensor.prompt)
            rank = stat.rank_of_other_choice(tensor)
            if rank > worst:
                worst, where = rank, tensor
    return worst, where


GRETACORE_GATE = "gretacore_gate"

RULES: tuple[Rule, ...] = (
    Rule(
        name="gretacore_hash",
        source="leaatimberini/gretacore, B3.66 analyzer; also the bitwise tests of vLLM's batch-invariant mode",
        formula="any bit differs",
        threshold=0.0,
        statistic=stat.bits_differ,
    ),
    Rule(
        name=GRETACORE_GATE,
        source="leaatimberini/gretacore, logits gate B3.67/B3.69",
        formula="p99|d| > 1e-3 or max|d| > 5e-3 or another top-1 token at more than 0.1 % of the positions",
        threshold=1.0,
        statistic=stat.gretacore_gate,
        logits_only=True,
    ),
    Rule(
        name="sglang_rel",
        source="sgl-project/sglang, debug_utils.comparator 0.5.23",
        formula="1 - 2 sum(xy) / sum(x²+y²) > 1e-3",
        threshold=1e-3,
        statistic=stat.calc_diff,
    ),
    Rule(
        name="polygraphy_simple",
        source="NVIDIA Polygraphy 0.53.6, --compare simple",
        formula="|d| > 1e-5 + 1e-5 |x| at any element",
        threshold=1.0,
        statistic=stat.elementwise_1e_5,
    ),
    Rule(
        name="polygraphy_l2",
        source="NVIDIA Polygraphy 0.53.6, --compare l2",
        formula="‖d‖ > 1e-5",
        threshold=1e-5,
        statistic=stat.l2_distance,
    ),
    Rule(
        name="polygraphy_cosine",
        source="NVIDIA Polygraphy 0.53.6, --compare cosine_similarity",
        formula="cosine < 0.997",
        threshold=0.997,
        direction="below",
        statistic=stat.cosine,
    ),
    Rule(
        name="polygraphy_snr",
        source="NVIDIA Polygraphy 0.53.6, --compare snr",
        formula="10 log10(sum x² / sum d²) < 20 dB",
        threshold=20.0,
        direction="below",
        statistic=stat.signal_to_noise,
    ),
    Rule(
        name="msprobe",
        source="Huawei mindstudio-probe 26.2.0, core/common/const.py:901-905 (called for MindSpore)",
        formula="(cosine < 0.99 and max|d| > 0.001) or cosine < 0.9 or max|d| > 1",
        threshold=1.0,
        statistic=stat.msprobe,
    ),
    Rule(
        name="torch_assert_close",
        source="torch.testing.assert_close, defaults by dtype",
        formula="|d| > atol + rtol |x|: 1.3e-6/1e-5 fp32, 1e-3/1e-5 fp16, 1.6e-2/1e-5 bf16",
        threshold=1.0,
        statistic=stat.assert_close,
    ),
    Rule(
        name="dynamo_same",
        source="torch._dynamo.utils.same with a float64 reference",
        formula="not allclose(1e-4) and rmse(y, r) > k rmse(x, r) + 1e-5; k is 3 at bf16, fp16 or under 1000 elements",
        threshold=1.0,
        statistic=stat.dynamo_same,
        needs_reference=True,
    ),
    Rule(
        name="flash_attention_3x",
        source="Dao-AILab/flash-attention, tests of flash_attn_with_kvcache",
        formula="max|y - r| > 3 max|x - r| + 1e-5",
        threshold=3.0,
        statistic=stat.three_times,
        needs_reference=True,
    ),
    Rule(
        name="neuron_module",
        source="aws-neuron/aws-neuron-sdk, vllm-neuron module test guidelines (2026-06)",
        formula="(BC < 0.99 and sigma > 1) or Linf ratio >= 5 or L2 ratio >= 3, against r",
        threshold=1.0,
        over_group=stat.neuron_module,
        needs_reference=True,
    ),
    Rule(
        name="neuron_logits",
        source="aws-neuron/aws-neuron-sdk, vllm-neuron logit validation (2026-07)",
        formula="top 5/50/1000/all off by 1.1/2/3/5 % and BC < 0.99 and sigma > 1",
        threshold=1.0,
        over_group=stat.neuron_logits,
        logits_only=True,
        needs_reference=True,
    ),
    Rule(
        name="llama_cpp_nmse_logits",
        source="ggml-org/llama.cpp, examples/model-conversion check-nmse.py",
        formula="sum d² / sum x² > 1e-2",
        threshold=1e-2,
        statistic=stat.nmse,
        logits_only=True,
    ),
    Rule(
        name="llama_cpp_nmse_tensors",
        source="ggml-org/llama.cpp, test-backend-ops MUL_MAT and FLASH_ATTN",
        formula="sum d² / sum x² > 5e-4",
        threshold=5e-4,
        statistic=stat.nmse,
    ),
    Rule(
        name="transformers_1e-5",
        source="huggingface/transformers 5.23.0, generation tests",
        formula="|d| > 1e-5 + 1e-5 |x| at any logit",
        threshold=1.0,
        statistic=stat.elementwise_1e_5,
        logits_only=True,
    ),
    Rule(
        name="sglang_k3",
        source="sgl-project/sglang, KL tests; 5e-3 is the threshold of issue #27070",
        formula="mean of exp(l) - 1 - l > 5e-3, l the log-probability ratio of the next token",
        threshold=5e-3,
        over_group=_mean_k3,
        logits_only=True,
    ),
    Rule(
        name="vllm_top_n",
        source="vllm-project/vllm, tests/models/utils.check_logprobs_close, 5 log-probabilities",
        formula="at the first other top-1 token, either choice is not among the other's top 5",
        threshold=5.0,
        over_group=_worst_first_mismatch,
        logits_only=True,
    ),
)
