"""What the pages of the zoo say of types that do not pass: each finding has a page, and holds in each of its types."""

from __future__ import annotations

import re
import runpy
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvdrift.report.schema.others import ZooRowView
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.zoo.build import build
from kvdrift.zoo.explained import EXPLAINED, explained

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 5, 19, 33]])
UNKNOWN: dict[str, Any] = {"scenarios": ["verify"], "transformers": "5"}


def types_of(finding: str, *scenarios: str) -> list[Any]:
    """The types that a finding is named for, each a matrix test but the first."""
    found = sorted(
        kind
        for each in EXPLAINED["hf"]
        if each.finding == finding and (not scenarios or each.scenarios & {*scenarios})
        for kind in each.types
    )
    return [found[0], *(pytest.param(kind, marks=pytest.mark.matrix) for kind in found[1:])]


def at_float64(kind: str) -> Any:
    model = build(kind).double()
    model.set_experts_implementation("eager")  # the other ones have no float64
    return model


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("name", ["zoo.md", "zoo-mlx.md"])
def test_every_cell_that_does_not_pass_is_explained(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()

    assert text.endswith("Without an explanation: nothing.\n")
    named = set(re.findall(r"\(findings/(\w+)\.md\)", text)) - {"README"}
    assert named
    for finding in named:
        assert (ROOT / f"docs/findings/{finding}.md").is_file()
        assert (ROOT / f"docs/findings/{finding}.py").is_file()


def test_a_cell_that_nothing_explains_is_named() -> None:
    rows = [
        ZooRowView(type="llama", state="STRUCTURAL_DRIFT", verdicts={"verify": Verdict.MISMATCH}, **UNKNOWN),
        ZooRowView(type="mamba", state="STRUCTURAL_DRIFT", verdicts={"verify": Verdict.MISMATCH}, **UNKNOWN),
        ZooRowView(type="zamba2", state="MISMATCH", verdicts={"verify": Verdict.INCONCLUSIVE}, **UNKNOWN),
    ]

    needed, left = explained(rows, "hf")

    assert left == ["llama verify MISMATCH"]
    assert [(each.finding, what) for each, what in needed] == [
        ("zamba2_time_step_of_a_decode_step", "zamba2: all"),
        ("mamba_state_of_several_tokens", "mamba: verify"),
    ]


@pytest.mark.parametrize("kind", types_of("export_import_of_a_sliding_cache"))
def test_a_moved_cache_forgets_its_length_in_each_type(kind: str) -> None:
    model = at_float64(kind)

    def step(*names: str, moved: bool = True) -> torch.Tensor:
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        if moved:
            layers = cache.layers
            cache = DynamicCache(ddp_cache_data=list(cache), config=model.config)
            for before, after in zip(layers, cache.layers, strict=True):
                vars(after).update({name: vars(before)[name] for name in names if name in vars(before)})
        logits: torch.Tensor = model(IDS[:, -1:], past_key_values=cache).logits[0, -1]
        return logits

    with torch.no_grad():
        right = step(moved=False)
        assert apart(step(), right) > 1e-3
        more = ("indexer_keys", "is_indexer_initialized") if kind == "dots3_note_text" else ()
        assert apart(step("cumulative_length", *more), right) < 1e-12


@pytest.mark.parametrize("kind", types_of("bart_left_padding", "batch_padded"))
def test_padding_on_the_left_is_counted_in_each_type(kind: str) -> None:
    model = build(kind).double()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * IDS.shape[1]])

    with torch.no_grad():
        right = model(IDS).logits[0, -1]
        assert apart(model(padded, attention_mask=mask).logits[0, -1], right) > 1e-3


@pytest.mark.parametrize("kind", types_of("roberta_positions_of_generate"))
def test_generate_numbers_positions_from_zero_in_each_type(kind: str) -> None:
    model = build(kind).double()
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    with torch.no_grad():
        given = model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=1, **options).logits[0][0]
        right = model(IDS).logits[0, -1]
        from_zero = model(IDS, position_ids=torch.arange(IDS.shape[1])[None]).logits[0, -1]
    assert apart(given, right) > 1e-3
    assert apart(given, from_zero) < 1e-6


@pytest.mark.parametrize("kind", types_of("rows_of_a_hybrid_cache"))
def test_a_choice_of_rows_breaks_the_next_step_in_each_type(kind: str) -> None:
    model = build(kind)  # not at float64, which Inkling 2 does not compute in
    rows = torch.cat([IDS, IDS + 20, IDS + 40])
    with torch.no_grad():
        cache = model(rows[:, :-1], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 2]))
        with pytest.raises(RuntimeError, match="Expected size 3 but got size 2"):
            model(rows[[0, 2], -1:], past_key_values=cache)


@pytest.mark.parametrize("kind", types_of("crop_of_a_recurrent_state"))
def test_a_cropped_cache_keeps_what_drafts_left_in_each_type(kind: str) -> None:
    model = at_float64(kind)
    name = next(name for name in ("past_key_values", "cache_params") if name in signature(model.forward).parameters)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        right = model(IDS).logits[0, -1]
        model(IDS[:, :-1], **{name: cache})
        cache.activate_past_recording()
        model(torch.tensor([[99, 98]]), **{name: cache})
        cache.crop(-2)
        try:
            found = model(IDS[:, -1:], **{name: cache}).logits[0, -1]
        except RuntimeError:
            assert kind == "zaya"  # its convolution state is too short then
        else:
            assert apart(found, right) > 1e-4


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("recurrent_gemma_states", [False, True, True, True]),
        ("deepseek_v4_cache", [False, True]),
        ("mlx_phi3small_mask", [True, False]),
    ],
)
def test_a_finding_is_what_its_script_shows(name: str, shown: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / f"docs/findings/{name}.py"))

    out = capsys.readouterr().out
    assert [float(figure) > 1e-3 for figure in re.findall(r" (\d\.\de[-+]\d\d)", out)] == shown
    if name == "deepseek_v4_cache":
        assert out.count("RuntimeError") == 2
        assert "static: KeyError" in out
