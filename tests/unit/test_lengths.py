"""The sweep over lengths: its prompts, its boundaries on drift tables made by hand, and what each length is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvdrift.capture.prompts import prompts_of_lengths
from kvdrift.errors import UsageError
from kvdrift.instruments.route import Route
from kvdrift.measure.measured import Measured
from kvdrift.pairing.drift import DriftTable
from kvdrift.report.lengths import build_lengths_view, narrowing
from kvdrift.report.markdown import render_markdown
from kvdrift.report.view import build_view
from kvdrift.verdict.boundaries import Boundary, Sweep, find_boundaries
from kvdrift.verdict.judge import decide_route, judge
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.sites import Site
from tests.support.traces import drift_row, dropped, scaled, synthetic_run, touches

LIMITS = {"vocab_size": 100, "max_positions": 50, "span": 4}


def encode(text: str) -> list[int]:
    return [ord(letter) % 100 for letter in text]


# ----------------------------------------------------------------------------------------------------------- prompts


def test_every_prompt_is_cut_from_the_longest_one_or_repeats_it() -> None:
    found = prompts_of_lengths((2, 4, 7), {"a": [9, 9], "b": [1, 2, 3]}, None, **LIMITS)

    assert found == {"length_2": (1, 2), "length_4": (1, 2, 3, 1), "length_7": (1, 2, 3, 1, 2, 3, 1)}


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_prompt_of_a_length_does_not_depend_on_the_others(with_tokenizer: bool) -> None:
    encoder = encode if with_tokenizer else None
    alone = prompts_of_lengths((30,), None, encoder, **LIMITS)
    among = prompts_of_lengths((5, 30, 46), None, encoder, **LIMITS)

    assert alone["length_30"] == among["length_30"]
    assert [len(tokens) for tokens in among.values()] == [5, 30, 46]
    assert len(set(among["length_46"])) > 10


def test_a_length_that_the_model_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        prompts_of_lengths((8, 47), None, None, **LIMITS)
    assert str(caught.value) == (
        "--lengths names 47; with a span of 4 that is 51, and the model has 50 positions; name lengths up to 46 "
        "(lengths=[...]) or use a smaller --span (span=...)"
    )
    assert len(prompts_of_lengths((8, 46), None, None, **LIMITS)["length_46"]) == 46


# -------------------------------------------------------------------------------------------------------- boundaries

LENGTHS = range(40, 60, 2)
SPAN = 4


def boundaries(
    drift: Callable[[int, int, int], float],
    *,
    lengths: Sequence[int] = LENGTHS,
    mode: str = "kv_aligned",
    routes: Sequence[Route] = (),
    beyond: Sequence[Address] = (),
) -> tuple[tuple[Boundary, ...], str | None]:
    """Find boundaries where attn_out of layer 0 to 2 drifts as a function of length, position and layer."""
    rows = []
    for length in lengths:
        for position in range(length, length + SPAN):
            for layer in range(3):
                size = drift(length, position, layer)
                address = Address(f"length_{length}", position, layer, Site.ATTN_OUT)
                rows.append(drift_row(mode, "bfloat16", address=address, rel_l2=size, equal=size == 0.0))
    sweep = Sweep({f"length_{length}": length for length in lengths}, DriftTable.of(rows), routes, "bfloat16", [mode])
    return find_boundaries(sweep, {mode: beyond}, 1e-3)


def rounding(length: int, position: int, layer: int) -> float:
    """Drift that grows with the number of keys as rounding may, and scatters."""
    scatter = np.random.default_rng(1000 * length + 10 * position + layer).uniform(0.7, 1.4)
    return float(1e-4 * position * scatter)


def where(found: tuple[Boundary, ...]) -> list[tuple[str, str, int, int, bool]]:
    return [(item.change, item.axis, item.before, item.after, item.rises) for item in found]


def test_rounding_that_grows_with_the_number_of_keys_is_no_jump() -> None:
    found, untested = boundaries(rounding, lengths=range(16, 512, 32))

    assert (found, untested) == ((), None)


@pytest.mark.parametrize("rises", [True, False])
def test_a_jump_of_the_drift_is_named_by_position(rises: bool) -> None:
    found, _ = boundaries(lambda n, p, layer: rounding(n, p, layer) * (4.0 if (p >= 51) is rises else 1.0))

    assert where(found) == [("drift", "position", 50, 51, rises)]


def test_a_jump_that_depends_on_the_prompt_is_named_by_length() -> None:
    found, _ = boundaries(lambda n, p, layer: rounding(n, p, layer) * (4.0 if n >= 50 else 1.0))

    assert where(found) == [("drift", "length", 48, 50, True)]


def test_less_than_one_bit_is_no_jump() -> None:
    found, _ = boundaries(lambda n, p, layer: 1e-3 * (1.9 if p >= 51 else 1.0))

    assert found == ()


def test_few_lengths_say_that_no_jump_could_be_told_from_chance() -> None:
    found, untested = boundaries(lambda n, p, layer: 4e-3 if p >= 44 else 1e-3, lengths=(40, 44))

    assert found == ()
    assert untested == (
        "jumps in the size of drift: 8 (prompt, position) pairs cannot tell one from chance at alpha 0.001; name more "
        "lengths, or take a larger --span"
    )


def test_bits_that_are_equal_up_to_a_position() -> None:
    found, _ = boundaries(lambda n, p, layer: 0.0 if p <= 49 else 1e-3, lengths=(44, 48, 52))

    assert where(found) == [("bits", "position", 49, 50, True)]
    assert found[0].text == "18 of 18 differ there, 0 of 18 on the other side"


def test_a_few_unequal_bits_here_and_there_are_no_boundary() -> None:
    """Most cells agree, as bf16 does; by luck all those of one length may."""
    found, _ = boundaries(
        lambda n, p, layer: 1e-3 if np.random.default_rng(100 * n + 10 * p + layer).uniform() < 0.08 else 0.0
    )

    assert found == ()


def test_a_mismatch_that_comes_and_goes_is_named_at_every_length() -> None:
    beyond = [Address(f"length_{n}", n, 1, Site.ATTN_OUT) for n in (44, 46, 52)]
    found, _ = boundaries(lambda n, p, layer: 0.0, beyond=beyond)

    assert where(found) == [
        ("mismatch", "length", 42, 44, True),
        ("mismatch", "length", 46, 48, False),
        ("mismatch", "length", 50, 52, True),
        ("mismatch", "length", 52, 54, False),
    ]
    assert [str(item.first) for item in found][:2] == [
        "length_44 / pos 44 / layer 1 / attn_out",
        "length_46 / pos 46 / layer 1 / attn_out",
    ]


def test_another_kernel_is_named_for_each_pass() -> None:
    def call(start: int, q_len: int) -> Call:
        kernel = "math" if start >= 45 or q_len >= 52 else "flash"
        return Call(start, q_len, start, start + q_len, "sdpa", (f"sdpa:{kernel}",))

    routes = [
        Route("kv_aligned", "bfloat16", f"length_{n}", (call(0, n + 4),), tuple(call(n + i, 1) for i in range(4)), ())
        for n in (42, 46, 50)
    ]
    found, _ = boundaries(lambda n, p, layer: 0.0, lengths=(42, 46, 50), routes=routes)

    assert where(found) == [("kernel", "length", 46, 50, True), ("kernel", "position", 44, 45, True)]
    assert found[0].text == "prefill runs sdpa, sdpa:math instead of sdpa, sdpa:flash"


def test_a_long_sweep_is_searched_in_a_moment() -> None:
    found, _ = boundaries(lambda n, p, layer: 4e-3 if p >= 3000 else 1e-3, lengths=range(1000, 5000, 4))

    assert where(found) == [("drift", "position", 2999, 3000, True)]


@pytest.mark.parametrize(
    ("before", "after", "span", "lengths"),
    [(64, 128, 4, "64-128:8"), (67, 80, 4, "67-79:4,80"), (64, 66, 4, "64-66"), (1, 4096, 4, "1-3585:512,4096")],
)
def test_the_lengths_that_narrow_a_gap_down(before: int, after: int, span: int, lengths: str) -> None:
    from kvdrift.vocabulary.plan import parse_lengths

    assert narrowing(before, after, span) == lengths
    named = parse_lengths(lengths)
    assert (named[0], named[-1]) == (before, after)
    assert len(named) <= 10


# ------------------------------------------------------------------------------------------------------------ report


def swept(**options: object) -> Measured:
    """A synthetic sweep over the lengths 8, 12 and 16."""
    run = synthetic_run(prompts=[(f"length_{n}", n) for n in (8, 12, 16)], **options)
    run.plan = AuditPlan(mode=run.plan.mode, span=run.plan.span, lengths=(8, 12, 16))
    return run


def verdicts_of(run: Measured) -> list[str]:
    view = build_lengths_view(judge(run))
    assert view is not None
    return [row["verdict"] for row in view["rows"]]


def test_a_run_without_lengths_has_no_such_section() -> None:
    run = synthetic_run()

    assert build_lengths_view(judge(run)) is None
    assert "### Lengths" not in render_markdown(build_view(judge(run)))


def test_each_length_has_its_own_verdict() -> None:
    edits = [scaled(touches(Site.ATTN_CTX, layer=1, prompt="length_12"), 1e-3)]
    run = swept(edits=edits)

    assert verdicts_of(swept()) == ["STRUCTURAL_DRIFT"] * 3
    assert verdicts_of(swept(noise=0.0)) == ["EXACT"] * 3
    assert verdicts_of(run) == ["STRUCTURAL_DRIFT", "MISMATCH", "STRUCTURAL_DRIFT"]
    text = render_markdown(build_view(judge(run)))
    assert "| 12 | MISMATCH | length_12 / pos 12 / layer 1 / attn_ctx |" in text
    assert "* Between length 8 and length 12 it begins that decode differs from prefill beyond rounding" in text
    assert "* Between length 12 and length 16 it ends that decode differs from prefill beyond rounding" in text


def test_a_mismatch_that_only_the_native_dtype_shows_is_put_at_its_length() -> None:
    place = touches(Site.ATTN_NORM_OUT, layer=1, prompt="length_12", label="kv_aligned", rungs=["bfloat16"])
    run = swept(edits=[scaled(place, 0.1)])

    assert decide_route(run).kind == "precision"
    assert verdicts_of(run) == ["STRUCTURAL_DRIFT", "MISMATCH", "STRUCTURAL_DRIFT"]


def test_a_length_with_a_gap_is_no_pass_and_the_others_are() -> None:
    run = swept(edits=[dropped(touches(Site.MLP_OUT, prompt="length_12", label="as_designed", rungs=["bfloat16"]))])

    assert verdicts_of(run) == ["STRUCTURAL_DRIFT", "INCONCLUSIVE", "STRUCTURAL_DRIFT"]
    text = render_markdown(build_view(judge(run)))
    assert "Length 12 is INCONCLUSIVE: 4 values have no partner in the other pass (TRACE_OFFSET)" in text


def test_no_length_passes_without_the_positive_control_or_a_rung() -> None:
    assert verdicts_of(swept(control=False)) == ["INCONCLUSIVE"] * 3
    failed = swept(rungs=["bfloat16", "float32"], rung_failures={"float64": "no float64 kernel"})
    assert verdicts_of(failed) == ["INCONCLUSIVE"] * 3


def test_a_fault_at_one_position_alone_is_told_as_one_place() -> None:
    lengths = (10, 11, 12, 13, 14)
    edits = [scaled(touches(Site.ATTN_CTX, layer=1, position=13), 1e-3)]
    run = synthetic_run(prompts=[(f"length_{n}", n) for n in lengths], edits=edits)
    run.plan = AuditPlan(mode=run.plan.mode, span=run.plan.span, lengths=lengths)

    view = build_lengths_view(judge(run))

    assert view is not None
    (told,) = [item for item in view["boundaries"] if item["change"] == "mismatch"]
    assert told["text"].startswith("at position 13 alone decode differs from prefill beyond rounding")
    assert told["text"].endswith("; at 12 and 14 it does not")
