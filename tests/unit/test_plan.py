"""The options of an audit: defaults, and a message for each that cannot be used."""

import msgspec
import numpy as np
import pytest

from kvdrift.errors import UsageError
from kvdrift.vocabulary.plan import AuditPlan, Mode, parse_layers, parse_lengths, sort_lengths


def test_the_defaults_are_those_of_the_handbook() -> None:
    plan = AuditPlan()
    assert msgspec.structs.asdict(plan) == {
        "mode": "both",
        "span": 4,
        "layers": None,
        "alpha": 1e-3,
        "ladder": "model",
        "seed": 0,
        "keep_traces": True,
        "lengths": None,
    }


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        AuditPlan().span = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mode", "modes"),
    [
        ("both", (Mode.AS_DESIGNED, Mode.KV_ALIGNED)),
        ("as_designed", (Mode.AS_DESIGNED,)),
        ("kv_aligned", (Mode.KV_ALIGNED,)),
    ],
)
def test_modes_are_run_as_designed_first(mode: str, modes: tuple[Mode, ...]) -> None:
    assert AuditPlan(mode=mode).modes == modes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'; use --mode as_designed, kv_aligned or both (mode=...)"),
        (
            {"span": 0},
            "span is 0, and at least 1 token after the prompt must be probed; use --span 4 (span=4)",
        ),
        ({"lengths": (128, 64)}, "lengths is (128, 64), and must ascend; use --lengths 64,128 (lengths=[64, 128])"),
        ({"lengths": ()}, "no length was named; use --lengths 64,128 (lengths=[64, 128])"),
        (
            {"lengths": (0, 3)},
            "0 is not the length of a prompt, which has at least 1 token; use --lengths 64,128 (lengths=[64, 128])",
        ),
        ({"alpha": 0.0}, "alpha is 0.0, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)"),
        ({"alpha": 1.0}, "alpha is 1.0, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)"),
        ({"alpha": float("nan")}, "alpha is nan, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)"),
    ],
)
def test_an_unusable_option_is_named_with_what_to_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        AuditPlan(**options)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", (0,)),
        ("0,3,10-12", (0, 3, 10, 11, 12)),
        (" 1 , 2 ", (1, 2)),
        ("5-5", (5,)),
        ("3,1,2-3", (1, 2, 3)),
    ],
)
def test_layers_are_read_as_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "1,,2", "1-2-3", "1.5", "0x1", "²", "1 2"])
def test_layers_that_cannot_be_read_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read .* write layers as 0,3,10-12"):
        parse_layers(text)


def test_a_range_that_runs_backwards_is_turned_round_in_the_message() -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers("0,12-10")
    assert str(caught.value) == "the range '12-10' in --layers '0,12-10' runs backwards; write it as 10-12"


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("64", (64,)),
        ("128, 64", (64, 128)),
        ("62-65", (62, 63, 64, 65)),
        ("1-10:4,100", (1, 5, 9, 100)),
        ("7-7", (7,)),
    ],
)
def test_lengths_are_read_as_numbers_and_ranges_with_a_step(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text", ["", "a", "-1", "1-", "1,,2", "1-2-3", "1.5", "²", "64:2", "1-9:0", "1-9:", "12345678"]
)
def test_lengths_that_cannot_be_read_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read .* write lengths as 64,128,250-260,512-1024:64"):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64,128,64", "the length 64 is named twice; use --lengths 64,128 (lengths=[64, 128])"),
        ("62-65,64", "the length 64 is named twice; use --lengths 64,128 (lengths=[64, 128])"),
        ("0", "0 is not the length of a prompt, which has at least 1 token; use --lengths 64,128 (lengths=[64, 128])"),
        ("9-3", "the range '9-3' in --lengths '9-3' runs backwards; write it as 3-9"),
        (
            "1-9999999",
            "9999999 lengths are named, and an audit takes at most 1000, each a prompt of its own; a range may have a "
            "step: --lengths 64-4096:64",
        ),
    ],
)
def test_lengths_that_make_no_sweep(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_lengths(text)
    assert str(caught.value) == message


def test_lengths_of_the_library_are_whole_numbers_in_any_order() -> None:
    assert sort_lengths(np.array([128, 64])) == (64, 128)
    assert sort_lengths(iter([3])) == (3,)
    for wrong in ("64", [64.0], 64, None):
        with pytest.raises(UsageError, match="the lengths are not a list of whole numbers: "):
            sort_lengths(wrong)  # type: ignore[arg-type]
