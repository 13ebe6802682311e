"""What is decided about two dumps of logprobs, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvdrift.errors import UsageError
from kvdrift.logprobs.estimates import Divergences, Estimate
from kvdrift.logprobs.noise import PairNoise, dtype_named
from kvdrift.vocabulary.evidence import Caveat, Verdict

# Rules by which trainers drop sequences, with what each computes from d, the difference of the logprobs of a token.
RULES = {
    "tme": "mean of exp(|d|), the token-mult-prob-error of NeMo-RL",
    "geo": "exp(|mean of d|), the geometric mean of the importance ratio",
    "seq": "exp(|sum of d|), the importance ratio of the sequence",
    "max": "largest exp(|d|) of a token",
    "k3": "mean of exp(d) - 1 - d",
}
GIVEN = "the dump's own word"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobPlan:
    """What is asked about two dumps.

    Attributes:
        third: a dump of A's engine that scored the same tokens in a prefill.
        repeat, repeat_b: dumps that A and B made a second time of the same tokens.
        dtype_a, dtype_b: what each side computes in; None if nobody knows.
        drop: RULE:LIMIT by which a trainer would drop sequences.
        alpha: chance of a false alarm that the whole comparison may have.
        seed: of shuffles.
    """

    third: str | None = None
    repeat: str | None = None
    repeat_b: str | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    drop: str = "tme:1.05"
    alpha: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        dtype_named(self.dtype_a, "--dtype-a (dtype_a=...)")
        dtype_named(self.dtype_b, "--dtype-b (dtype_b=...)")
        if not 0.0 < self.alpha < 0.5:
            raise UsageError(f"alpha is {self.alpha}, and must lie between 0 and 0.5; use --alpha 0.001 (alpha=0.001)")
        rule, _, limit = self.drop.partition(":")
        try:
            good = rule in RULES and float(limit) > 0.0
        except ValueError:
            good = False
        if not good:
            raise UsageError(
                f"--drop {self.drop} is not RULE:LIMIT with a RULE of {', '.join(RULES)}; such as tme:1.05"
            )

    @property
    def dtypes(self) -> tuple[str | None, str | None]:
        return dtype_named(self.dtype_a, "--dtype-a"), dtype_named(self.dtype_b, "--dtype-b")

    @property
    def rule(self) -> tuple[str, float]:
        """The rule by which sequences are dropped, and its limit."""
        name, _, limit = self.drop.partition(":")
        return name, float(limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceResult:
    """One sequence.

    Attributes:
        n: tokens that count: finite, with the same experts where experts are known.
        ratio: typical (rms) difference over the bound, and `limit`, what it may be for so few tokens.
        largest: the largest difference of a token over the bound, which is at `largest_at`, counted from 0.
        beyond: whether rounding cannot explain it, and `why`.
        change: index of the token from which on it drifts more, None if there is no such token.
        drop: the value of the trainer's rule, and whether that drops it.
    """

    name: str
    n: int
    ratio: float
    limit: float
    largest: float
    largest_at: int
    beyond: bool
    why: str | None
    change: int | None
    drop: float
    dropped: bool


@dataclass(frozen=True, slots=True)
class TokenStretch:
    """Tokens `first` to `last` of all sequences, counted from 0: how many of them count, and their typical (rms)
    difference over the bound."""

    first: int
    last: int
    n: int
    rms: float


@dataclass(frozen=True, slots=True)
class Resemblance:
    """A cause that fits, and one sentence; `share` of the squared difference that it explains, None if unknown."""

    name: str
    text: str
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Guilt:
    """Which side is off: `A`, `B`, `third`, or None where that cannot be told; and why."""

    side: str | None
    text: str
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ties:
    """Tokens at which the likeliest token is another one, `moved`; near ties are those within the bound."""

    n_known: int
    n_near: int
    n_moved: int
    n_moved_near: int


@dataclass(frozen=True, slots=True)
class Flips:
    """Tokens with other experts, and K3 of those with and without."""

    n: int
    n_tokens: int
    k3_with: Estimate | None
    k3_without: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobDecision:
    """The judgement of two dumps; see docs/compare.md."""

    verdict: Verdict
    conclusion: str
    reasons: tuple[str, ...]
    noise: PairNoise
    estimates: Divergences
    typical: float
    ratio: float
    p_value: float | None
    smallest_p: float | None
    sequences: tuple[SequenceResult, ...]
    along: tuple[TokenStretch, ...]
    rule: str
    cause: Resemblance | None
    guilt: Guilt | None
    ties: Ties | None
    flips: Flips | None
    n_tokens: int
    n_nonfinite: int
    lost: dict[str, int]
    alpha: float
    caveats: tuple[Caveat, ...]

    @property
    def n_beyond(self) -> int:
        return sum(item.beyond for item in self.sequences)

    @property
    def dropped(self) -> tuple[SequenceResult, ...]:
        return tuple(item for item in self.sequences if item.dropped)

    @property
    def first(self) -> SequenceResult | None:
        """The sequence that is furthest beyond rounding, None if none is."""
        beyond = [item for item in self.sequences if item.beyond]
        return max(beyond, key=lambda item: max(item.ratio / item.limit, 0.0)) if beyond else None
