"""The row-wise directed tests, on norms and rotations that are computed here, right and wrong, and rounded."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.instruments.base import Directed
from kvdrift.instruments.directed import RowWise, judge_directed
from kvdrift.instruments.rowwise import RowTable
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
Norm = Callable[[Floats, Floats, float], Floats]

WIDTH, HEADS, DIM, BASE = 1024, 4, 32, 1e4
UNITS = [(f"p{n}", start + k) for n, start in enumerate((5, 21, 40)) for k in range(4)]
# Mean squares as in a trained model: embeddings are small, and the residual grows.
SIZES = (0.1, 1.0, 3.0)


def bf16(values: Floats) -> Floats:
    return np.asarray(values.astype(ml_dtypes.bfloat16).astype(np.float64))


def truncated(values: Floats) -> Floats:
    """Towards zero instead of to the nearest."""
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def rms(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """As transformers does: rounded before it is scaled, and after."""
    return bf16(weight * bf16(x / np.sqrt((x**2).mean() + epsilon)))


def rms_rounded_once(x: Floats, weight: Floats, epsilon: float) -> Floats:
    return bf16(weight * x / np.sqrt((x**2).mean() + epsilon))


def rms_truncated(x: Floats, weight: Floats, epsilon: float) -> Floats:
    return truncated(weight * x / np.sqrt((x**2).mean() + epsilon))


def layer_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    return bf16(weight * (x - x.mean()) / np.sqrt(x.var() + epsilon))


def found(rows: Callable[[Trace, Trace, str, int], None], alpha: float = 5e-4) -> tuple[Directed, ...]:
    """Judge pairs of traces that `rows` fills for every unit."""
    table = RowTable()
    for prompt in sorted({name for name, _ in UNITS}):
        positions = tuple(p for name, p in UNITS if name == prompt)
        tokens = tuple(range(positions[-1] + 1))
        prefill, decode = (
            Trace(prompt, "prefill", "x", "bfloat16", tokens),
            Trace(prompt, "decode", "x", "bfloat16", tokens),
        )
        for position in positions:
            rows(prefill, decode, prompt, position)
        table.add(PassPair(Mode.KV_ALIGNED, prefill, decode, positions))
    fresh = [row.address for row in table.rows]
    causes, evidence = judge_directed((), "kv_aligned", Arithmetic("bfloat16"), alpha, 0, RowWise(table, fresh))
    assert evidence.valid
    return causes


def norms(
    wrong: Norm,
    change: float,
    right: Norm = rms,
    *,
    epsilon: float = 1e-5,
    shift: float = 0.0,
    same_input: bool = False,
    layers: tuple[int, ...] = (0, 1, 2),
) -> tuple[Directed, ...]:
    """Norms of three layers, of which decode computes `layers` by `wrong`, with another epsilon."""

    def rows(prefill: Trace, decode: Trace, prompt: str, position: int) -> None:
        seed = 0 if same_input else 1000 * int(prompt[1:]) + position
        for layer, size in enumerate(SIZES):
            rng = np.random.default_rng((seed, layer))
            x = bf16(size * (rng.normal(size=WIDTH) + shift))
            weight = bf16(np.random.default_rng(layer).uniform(0.5, 1.5, size=WIDTH))
            other = wrong(x, weight, epsilon + change) if layer in layers else right(x, weight, epsilon)
            for trace, y in ((prefill, right(x, weight, epsilon)), (decode, other)):
                trace.add_rows(layer, Site.LAYER_IN, (position,), x[None])
                trace.add_rows(layer, Site.ATTN_NORM_OUT, (position,), y[None])

    return found(rows)


@pytest.mark.parametrize("change", [-9e-6, 9e-5, 1e-3])
def test_another_epsilon_is_found_and_its_size_is_right(change: float) -> None:
    (cause,) = norms(rms, change)
    assert (cause.cause, cause.address.place) == ("norm_epsilon", (0, "attn_norm_out"))
    assert cause.size == pytest.approx(change, rel=0.1)


def test_the_epsilon_of_a_layer_norm_acts_on_the_variance() -> None:
    """With a mean as large as three deviations, the mean square is ten times the variance."""
    (cause,) = norms(layer_norm, 1e-4, layer_norm, shift=3.0)
    assert cause.size == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize("twin", [rms, rms_rounded_once, rms_truncated])
def test_a_norm_that_rounds_otherwise_has_no_other_epsilon(twin: Norm) -> None:
    assert norms(twin, 0.0) == ()


@pytest.mark.parametrize("twin", [rms_rounded_once, rms_truncated])
def test_one_row_that_is_seen_again_and_again_is_rounded_alike_and_proves_nothing(twin: Norm) -> None:
    """Every unit has the same token: its embedding is normed to the same bits, and one error has one sign."""
    assert norms(twin, 0.0, same_input=True) == ()


def test_a_factor_in_one_layer_is_not_taken_for_an_epsilon_where_others_are_right() -> None:
    assert [c for c in norms(rms_truncated, 0.0, layers=(0,)) if abs(c.size) > 1e-4] == []


def rms_in_half(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """The mean square and its root are kept in bfloat16."""
    mean = bf16(np.array((bf16(x**2)).mean() + epsilon))
    return bf16(weight * bf16(x * bf16(1.0 / np.sqrt(mean))))


@pytest.mark.parametrize("right", [rms, rms_rounded_once, rms_truncated])
def test_a_statistic_in_half_precision_gives_every_row_a_factor_of_its_own(right: Norm) -> None:
    (cause,) = norms(rms_in_half, 0.0, right)

    assert (cause.cause, cause.address.place) == ("norm_dtype", (0, "attn_norm_out"))
    assert 2.0**-8 / 4 < cause.size < 2.0**-8
    assert 0.1 < cause.explained <= 1.0


def test_it_begins_in_the_first_layer_that_has_it() -> None:
    (cause,) = norms(rms_in_half, 0.0, layers=(1, 2))

    assert (cause.cause, cause.address.place) == ("norm_dtype", (1, "attn_norm_out"))


def test_the_same_statistic_in_both_passes_with_a_rounding_turned_in_two_rows_is_no_fault() -> None:
    """Another order of a sum may turn the rounding of a statistic that the engine itself keeps in half precision."""
    seen = dict.fromkeys(range(len(SIZES)), 0)

    def turned(x: Floats, weight: Floats, epsilon: float) -> Floats:
        layer = int(np.argmin([abs(np.sqrt((x**2).mean()) - size) for size in SIZES]))
        seen[layer] += 1
        return rms_in_half(x, weight, epsilon) * (1.0 + 2.0**-7 if seen[layer] <= 2 else 1.0)

    assert norms(turned, 0.0, rms_in_half) == ()
    assert set(seen.values()) == {len(UNITS)}


def test_factors_of_one_row_that_is_seen_again_and_again_prove_nothing() -> None:
    assert "norm_dtype" not in [cause.cause for cause in norms(rms_in_half, 0.0, same_input=True)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("width", [32, 256])
def test_right_norms_of_rows_of_few_values_are_no_fault(seed: int, width: int) -> None:
    """The same few values over and over are rounded alike, each with all its copies."""
    rng = np.random.default_rng(seed)
    values = bf16(rng.normal(size=5))

    def rows(prefill: Trace, decode: Trace, prompt: str, position: int) -> None:
        x = rng.choice(values, size=width) * float(rng.uniform(0.5, 2.0))
        weight = np.ones(width)
        for trace, norm in ((prefill, rms), (decode, rms_rounded_once)):
            trace.add_rows(0, Site.LAYER_IN, (position,), bf16(x)[None])
            trace.add_rows(0, Site.ATTN_NORM_OUT, (position,), norm(bf16(x), weight * 1.3, 1e-5)[None])

    assert found(rows) == ()


def rotate(x: Floats, cos: Floats, sin: Floats, halves: bool, step: Callable[[Floats], Floats]) -> Floats:
    """Rotary embedding of one head, each operation rounded by `step`."""
    pairs = (x[: DIM // 2], x[DIM // 2 :]) if halves else (x[0::2], x[1::2])
    out = [step(step(a * cos) + s * step(b * sin)) for a, b, s in ((*pairs, -1.0), (*pairs[::-1], 1.0))]
    return np.concatenate(out) if halves else np.stack(out, axis=1).ravel()


def turns(
    *,
    base: float = 1.0,
    scaling: float = 1.0,
    offset: int = 0,
    table: Callable[[Floats], Floats] = bf16,
    step: Callable[[Floats], Floats] = bf16,
    halves: bool = True,
    equal_inputs: bool = False,
    heads: int = HEADS,
) -> tuple[Directed, ...]:
    """Queries of two layers, of which decode rotates in another way; its vectors before differ a little too."""

    def rows(prefill: Trace, decode: Trace, prompt: str, position: int) -> None:
        for layer in range(2):
            rng = np.random.default_rng((int(prompt[1:]), position, layer))
            x = bf16(rng.normal(size=(heads, DIM)))
            y = x if equal_inputs else bf16(x * (1.0 + 2.0**-8 * rng.normal(size=x.shape)))
            share = np.arange(DIM // 2) / (DIM // 2)
            for trace, given, at, b, f, t, s in (
                (prefill, x, position, BASE, 1.0, bf16, bf16),
                (decode, y, position + offset, BASE * base, scaling, table, step),
            ):
                angle = at * f * b**-share
                turned = [rotate(head, t(np.cos(angle)), t(np.sin(angle)), halves, s) for head in given]
                trace.add_rows(layer, Site.Q_PROJ, (position,), given.ravel()[None])
                trace.add_rows(layer, Site.Q_ROPE, (position,), np.stack(turned)[None])
                trace.add_cache_read(layer, Site.K_CACHE, (position,), np.arange(1), np.zeros((1, 1, DIM)))

    return found(rows)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize(
    ("options", "cause", "size"),
    [
        ({"base": 1.02}, "rope_base", np.log(1.02)),
        ({"scaling": 1.002}, "rope_scaling", 2e-3),
    ],
)
def test_another_rotation_is_found_and_its_size_is_right(
    options: dict[str, float], cause: str, size: float, halves: bool
) -> None:
    (told,) = turns(**options, halves=halves)  # type: ignore[arg-type]
    assert (told.cause, told.address.place) == (cause, (0, "q_rope"))
    assert told.size == pytest.approx(size, rel=0.1)


def test_a_rotation_at_the_next_position_is_found() -> None:
    (told,) = turns(offset=1)
    assert (told.cause, told.address.place) == ("rope_position_offset", (0, "q_rope"))


@pytest.mark.parametrize("table", [bf16, lambda values: values])
@pytest.mark.parametrize("step", [bf16, lambda values: values, truncated])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_rotation_that_rounds_otherwise_turns_by_the_same_angles(
    table: Callable[[Floats], Floats], step: Callable[[Floats], Floats], heads: int
) -> None:
    """Tables in more precision, operations in more, a kernel that truncates: angles of either sign, and no cause."""
    assert turns(table=table, step=step, heads=heads) == ()
