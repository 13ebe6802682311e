"""The report: strict JSON, every row of the founding report, and tables that hold whatever ids they are given."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from kvdrift.measure.measured import Measured
from kvdrift.report.markdown import _cell, render_markdown
from kvdrift.report.recommend import _LOOK_AT, recommend
from kvdrift.report.view import build_view, figure, to_strict_json, yes_no
from kvdrift.verdict.decide import broken_values
from kvdrift.verdict.judge import judge
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import AFTER_LAYERS, EXPECTED_SITES, Site
from tests.support.traces import dropped, scaled, synthetic_run, touches, with_first

# Large enough to show in bfloat16 bits too.
MISMATCH = [scaled(touches(Site.K_CACHE, layer=1, position=17), 1e-2)]
PROMPTS = (("p0_short", 1), ("p6_len_16", 16), ("p6_len_32", 32))
EVIL = ("a|b", "`tick`", "two\nlines", "*bold*", "<script>", "back\\slash|", "[link](x)", "| --- |")


def view_of(**options: object) -> dict[str, Any]:
    run = synthetic_run(**options)
    return build_view(judge(run))


def markdown(**options: object) -> str:
    return render_markdown(view_of(**options))


RUNS: dict[str, Callable[[], Measured]] = {
    "clean": synthetic_run,
    "exact": lambda: synthetic_run(noise=0.0),
    "mismatch": lambda: synthetic_run(edits=MISMATCH),
    "nan": lambda: synthetic_run(edits=[with_first(touches(), math.nan)]),
    "nan on both sides": lambda: synthetic_run(edits=[with_first(touches(pass_name=None), math.nan)]),
    "one mode": lambda: synthetic_run(mode="kv_aligned"),
    "no mode": lambda: synthetic_run(mode="kv_aligned", can_rewind=False),
    "no ladder": lambda: synthetic_run(rungs=["bfloat16"], rung_failures={"float64": "boom\nagain"}),
    "nothing": lambda: synthetic_run(edits=[dropped(touches(pass_name=None, control=True))]),
    "no attention": lambda: synthetic_run(
        edits=[
            dropped(touches(site, pass_name=None, control=True))
            for site in (Site.K_CACHE, Site.V_CACHE, Site.ATTN_SCORES, Site.ATTN_PROBS, Site.Q_PROJ)
        ]
    ),
    "evil ids": lambda: synthetic_run(prompts=[(name, 3) for name in EVIL], edits=MISMATCH),
}


# --------------------------------------------------------------------------------------------------------------- JSON


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", RUNS)
def test_the_json_is_strict_and_whole(name: str) -> None:
    run = RUNS[name]()
    report = strict(to_strict_json(build_view(judge(run))))
    assert list(report) == [
        "schema_version",
        "created",
        "model",
        "verdict",
        "kind",
        "scope",
        "exit_code",
        "first_failure",
        "diagnosis",
        "reasons",
        "lengths",
        "strip",
        "modes",
        "projection_hashes",
        "attention_stats",
        "kv_alignment",
        "about",
        "hypotheses",
        "recommendations",
        "instruments",
        "coverage",
        "caveats",
        "environment",
    ]
    assert report["schema_version"] == 1
    assert set(report["modes"]) == {"as_designed", "kv_aligned"}


def test_that_the_strict_parser_can_refuse() -> None:
    for text in ("NaN", "Infinity", "[-Infinity]"):
        with pytest.raises(AssertionError, match="is not JSON"):
            strict(text)


def test_figures_that_json_cannot_hold_are_words() -> None:
    values = {"a": [math.nan, math.inf, (-math.inf, 1.5)], 3: None}
    assert strict(to_strict_json(values)) == {"a": ["nan", "inf", ["-inf", 1.5]], "3": None}  # type: ignore[arg-type]


def test_the_json_names_verdict_address_and_exit_code() -> None:
    report = strict(to_strict_json(view_of(edits=MISMATCH)))
    assert (report["verdict"], report["kind"], report["exit_code"]) == ("MISMATCH", "semantic", 1)
    assert {key: report["first_failure"][key] for key in ("prompt", "position", "layer", "site")} == {
        "prompt": "p6_len_16",
        "position": 17,
        "layer": 1,
        "site": "k_cache",
    }


def test_the_json_has_the_projections_of_every_layer_mode_and_prompt() -> None:
    entries = view_of()["projection_hashes"]
    assert {(e["mode"], e["tensor"], e["layer"], e["prompt"]) for e in entries} == {
        (mode, tensor, layer, prompt)
        for mode in ("as_designed", "kv_aligned")
        for tensor in ("q_proj", "k_proj", "v_proj")
        for layer in (0, 1)
        for prompt in ("p0_short", "p6_len_16")
    }
    assert all(re.fullmatch("[0-9a-f]{64}", entry["sha256_prefill"]) for entry in entries)


def test_coverage_says_what_was_not_offered() -> None:
    gone = [dropped(touches(Site.ATTN_SCORES, pass_name=None)), dropped(touches(Site.V_PROJ, layer=1, pass_name=None))]
    coverage = view_of(edits=gone)["coverage"]
    assert coverage["sites_not_offered"] == ["attn_scores"]
    assert coverage["sites_in_some_layers_only"] == ["v_proj"]
    assert coverage["sites_recorded"]["v_proj"] == 1
    assert coverage["rungs"] == ["bfloat16", "float32", "float64"]
    whole = view_of()["coverage"]
    assert (whole["sites_not_offered"], whole["sites_in_some_layers_only"]) == ([], [])


# ---------------------------------------------------------------------------------------------- the founding report

HEADINGS = [
    "## 1. Execution Summary",
    "## 2. KV Alignment Analysis (kv_aligned mode)",
    "### Projection Hashes",
    "### Attention Statistics",
    "### KV Alignment Indicators",
    "## 3. Drift Structural vs Real Mismatch",
    "### Hypothesis Testing",
    "### Evidence",
    "### Conclusion",
    "## 4. Recommendations",
]
# Sections that the founding report does not have, and whose order is kept.
FURTHER = ["## 5. Coverage", "## 6. Caveats", "## 7. Environment", "## 8. How to Reproduce"]
COLUMNS = [
    ["Mode", "Status", "First Failure", "Pass/Fail Count"],
    ["Tensor", "Layer", "Prompt", "Hash", "Notes"],
    ["Metric", "Pre-Softmax", "Post-Softmax"],
    ["Indicator", "Value", "Interpretation"],
    ["Evidence", "Supports H₀", "Supports H₁"],
]
ROWS = [
    "as_designed",
    "kv_aligned",
    *(f"{tensor} | 0 | {name}" for tensor in ("q_proj", "k_proj", "v_proj") for name, _ in PROMPTS),
    "Min",
    "Max",
    "Mean",
    "K Hash Consistency",
    "V Hash Consistency",
    "K-V Aligned",
    "K hashes vary across prompts",
    "V hashes vary across prompts",
    "K and V of decode match prefill at the same layer",
    "Attention outputs diverge",
    "Drift scales with the unit roundoff",
    "Positive control seen",
]


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table of a Markdown text, split as GitHub splits them."""
    found: list[list[list[str]]] = [[]]
    for line in text.split("\n"):
        if line.startswith("|"):
            cells = re.findall(r"((?:\\.|[^|\\])*)\|", line[1:])
            found[-1].append([cell.strip() for cell in cells])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@pytest.mark.parametrize("name", RUNS)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(name: str) -> None:
    run = RUNS[name]()
    for table in tables(render_markdown(build_view(judge(run)))):
        assert len(table) > 2, f"no row under {table[0]}"
        assert re.fullmatch("-+", "".join(table[1]))
        assert {len(row) for row in table} == {len(table[0])}


def test_that_the_check_of_tables_can_see_a_stray_pipe() -> None:
    assert [len(row) for row in tables("| a | b |\n|--|--|\n| x|y | z |")[0]] == [2, 2, 3]
    assert [len(row) for row in tables("| x\\|y | z |\n")[0]] == [2]


@pytest.mark.parametrize("name", RUNS)
def test_no_cell_is_empty_where_a_figure_belongs(name: str) -> None:
    run = RUNS[name]()
    for table in tables(render_markdown(build_view(judge(run)))):
        may_be_empty = {i for i, head in enumerate(table[0]) if head.startswith("Supports")}
        for row in table[2:]:
            assert all(cell for i, cell in enumerate(row) if i not in may_be_empty), row


def test_all_headings_of_the_founding_report_are_there_in_order() -> None:
    lines = markdown(prompts=PROMPTS).split("\n")
    assert [line for line in lines if line.startswith("##")] == HEADINGS + FURTHER


def test_all_columns_of_the_founding_report_are_there() -> None:
    heads = [table[0] for table in tables(markdown(prompts=PROMPTS))]
    for columns in COLUMNS:
        assert any(all(any(cell.startswith(column) for cell in head) for column in columns) for head in heads), columns


def test_all_rows_of_the_founding_report_are_there() -> None:
    text = markdown(prompts=PROMPTS)
    for row in ROWS:
        assert f"\n| {row}" in text, row


def test_the_head_of_the_founding_report_is_there() -> None:
    text = markdown()
    assert re.search(r"^\*\*Date\*\*: 2026-01-02", text, re.MULTILINE)
    assert re.search(r"^\*\*Status\*\*: PASS", text, re.MULTILINE)
    assert re.search(r"^\*\*Mode\*\*: both", text, re.MULTILINE)
    assert "**H₀ (Null Hypothesis)**: " in text
    assert "**H₁ (Alternative)**: " in text


@pytest.mark.parametrize("name", ["clean", "exact", "mismatch"])
def test_nothing_is_left_to_be_determined_when_both_modes_ran(name: str) -> None:
    run = RUNS[name]()
    text = render_markdown(build_view(judge(run)))
    for word in ("TBD", "PENDING", "NOT RUN", "not measured", "not recorded", "NaN", "None", "unknown", "(empty)"):
        assert word not in text, word


@pytest.mark.parametrize(("mode", "other"), [("as_designed", "kv_aligned"), ("kv_aligned", "as_designed")])
def test_a_mode_that_did_not_run_says_so_everywhere(mode: str, other: str) -> None:
    text = markdown(mode=mode)
    assert f"| {other} | NOT RUN | NOT RUN | NOT RUN | NOT RUN | NOT RUN |" in text
    assert f"| Metric ({other}) |" in text
    for indicator in ("K Hash Consistency", "V Hash Consistency", "K-V Aligned"):
        assert f"| {indicator} ({other}) | NOT RUN |" in text
    assert "Only one mode ran, so this is not a full conclusion." in text
    assert f"MODE_NOT_RUN: {other} did not run" in text
    assert "not a full conclusion" not in markdown()


def test_an_inconclusive_run_gives_its_reason_and_no_hypothesis() -> None:
    text = markdown(control=False)
    assert "**INCONCLUSIVE** - Neither H0 nor H1 in plain decode: 1 row in the batch, " in text
    assert ". Why: positive control not seen: no fault was planted." in text
    assert "Do not read this run as a pass" in text


def test_a_mismatch_names_the_first_failure_and_its_slot() -> None:
    def spoil(place, values):  # type: ignore[no-untyped-def]
        if touches(Site.K_CACHE, layer=1, position=17)(place):
            values = values.copy()
            values[5] = values[4]
        return values

    text = markdown(edits=[spoil])
    assert "**First failure**: p6_len_16 / pos 17 / layer 1 / k_cache / slot 5" in text
    assert "**MISMATCH** - H1" in text
    assert "| K Hash Consistency (kv_aligned) | bitwise True, within noise True" not in text


# ------------------------------------------------------------------------------------------------------- what rows say


def evidence(view: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = [row for row in view["hypotheses"]["evidence"] if row["evidence"] == name]
    return {key: row[key] for key in ("supports_h0", "supports_h1", "against_the_run")}


H0 = {"supports_h0": True, "supports_h1": False, "against_the_run": False}
H1 = {"supports_h0": False, "supports_h1": True, "against_the_run": False}
AGAINST = {"supports_h0": False, "supports_h1": False, "against_the_run": True}


def test_ticks_of_the_evidence_table_follow_the_data() -> None:
    clean, faulty = view_of(), view_of(edits=MISMATCH)
    for mode in ("as_designed", "kv_aligned"):
        for name in ("K and V of decode match prefill at the same layer", "Drift scales with the unit roundoff"):
            assert evidence(clean, f"{name} ({mode})") == H0
            assert evidence(faulty, f"{name} ({mode})") == H1
        assert evidence(faulty, f"Attention outputs diverge beyond noise ({mode})") == H0
    outputs = view_of(edits=[scaled(touches(Site.ATTN_CTX), 1e-3)])
    assert evidence(outputs, "Attention outputs diverge beyond noise (kv_aligned)") == H1
    assert evidence(outputs, "K and V of decode match prefill at the same layer (kv_aligned)") == H0


def test_equal_bits_are_evidence_for_h0() -> None:
    assert evidence(view_of(noise=0.0), "Same bits on two proven routes (kv_aligned)") == H0


def test_a_blind_run_is_evidence_against_itself() -> None:
    assert evidence(view_of(control=False), "Positive control seen") == AGAINST
    assert "| Positive control seen | no fault was planted |  |  | ✗ |" in markdown(control=False)


def test_indicators_follow_the_data() -> None:
    clean = view_of()["kv_alignment"]
    assert clean["kv_aligned"]["aligned"] == {"bitwise": True, "within_noise": True}
    assert clean["as_designed"]["aligned"] == {"bitwise": False, "within_noise": True}
    faulty = view_of(edits=MISMATCH)["kv_alignment"]
    assert faulty["kv_aligned"]["aligned"] == {"bitwise": False, "within_noise": False}
    assert faulty["kv_aligned"]["v"]["bitwise"] is True
    assert "MISMATCH: the key rows" in markdown(edits=MISMATCH)
    nothing = view_of(edits=[dropped(touches(Site.K_CACHE, pass_name=None, control=True))])["kv_alignment"]
    assert nothing["kv_aligned"]["aligned"] == {"bitwise": None, "within_noise": None}


def test_notes_of_projections_follow_the_data() -> None:
    assert "bit-exact at all 2 positions |" in markdown(noise=0.0)
    assert re.search(r"max \d+ ULP, relative 0\.0\d+; excess [\d.e-]+, within noise", markdown())
    beyond = markdown(edits=[scaled(touches(Site.K_PROJ, layer=0), 1e-2)])
    assert re.search(r"\| k_proj \| 0 \|.*beyond noise \|", beyond)
    assert "excess not measured" in markdown(rungs=["bfloat16"])
    hidden = markdown(noise=0.0, edits=[scaled(touches(Site.K_PROJ, layer=0, rungs=["float64"]), 1e-2)])
    assert re.search(r"\| k_proj \| 0 \|.*bit-exact at all 2 positions; excess .*, beyond noise \|", hidden)


def test_statistics_without_a_visible_key_are_not_measured() -> None:
    run = synthetic_run()
    for item in run.attention.by_place.values():
        item.n, item.smallest, item.largest = 0, math.inf, -math.inf
    stats = build_view(judge(run))["attention_stats"]["kv_aligned"]["attn_scores"]["decode"]["all"]
    assert stats == {"min": None, "max": None, "mean": None, "n": 0}


# ----------------------------------------------------------------------------------------------------- recommendations


@pytest.mark.parametrize("site", EXPECTED_SITES)
def test_a_mismatch_recommends_a_look_at_its_first_site(site: Site) -> None:
    layer = None if site in AFTER_LAYERS | {Site.EMBED_OUT} else 1
    view = view_of(edits=[scaled(touches(site, layer=layer, position=17), 1e-3)])
    for_cause = Cause(view["diagnosis"]["cause"]).remedy
    advice = view["recommendations"]
    assert advice[0] == (for_cause or advice[0])
    first = advice[for_cause is not None]
    assert first.startswith(f"Look at {_LOOK_AT[site]}")
    assert f"/ {site}." in first


def test_every_site_has_its_own_recommendation() -> None:
    assert set(_LOOK_AT) == set(Site)
    assert len(set(_LOOK_AT.values())) == len(Site)


def test_recommendations_differ_by_verdict() -> None:
    options: list[dict[str, object]] = [{}, {"noise": 0.0}, {"edits": MISMATCH}, {"control": False}]
    texts = [" ".join(view_of(**some)["recommendations"]) for some in options]
    assert len(set(texts)) == 4
    assert ["tolerance" in text for text in texts] == [True, False, True, False]


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("as_designed", "it came through the content of the cache"),
        ("kv_aligned", "It shows only after a rewind"),
        (None, "the decode path itself makes it"),
    ],
)
def test_a_mismatch_says_what_the_two_modes_tell(label: str | None, text: str) -> None:
    steps = view_of(edits=[scaled(touches(Site.MLP_OUT, layer=1, label=label), 1e-3)])["recommendations"]
    assert text in " ".join(steps)


def test_a_mismatch_in_the_cache_of_both_modes_is_not_blamed_on_arithmetic() -> None:
    text = " ".join(view_of(edits=MISMATCH)["recommendations"])
    assert "rows change between prefill's write and decode's read" in text
    assert "the decode path itself makes it" not in text


@pytest.mark.parametrize("mode", ["as_designed", "kv_aligned"])
def test_one_mode_alone_does_not_claim_what_the_other_would_show(mode: str) -> None:
    text = " ".join(view_of(mode=mode, edits=[scaled(touches(Site.MLP_OUT, layer=1), 1e-3)])["recommendations"])
    for claim in ("came through", "only after a rewind", "the decode path itself"):
        assert claim not in text


# ------------------------------------------------------------------------------------------------- cells and figures


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain_id", "plain_id"),
        ("a|b", "a\\|b"),
        ("a\\|b", "a\\\\\\|b"),
        ("`x`", "\\`x\\`"),
        ("two\nlines\r\n\x0b\u2028end", "two lines end"),
        ("<b>", "\\<b>"),
        ("", "(empty)"),
        (" \n", "(empty)"),
        (3, "3"),
    ],
)
def test_a_cell_keeps_its_value_to_itself(value: object, expected: str) -> None:
    assert _cell(value) == expected


def test_the_command_stays_in_its_block_whatever_it_holds() -> None:
    text = markdown(command="kvdrift audit --prompt 'two\n## lines'")
    assert "\n    kvdrift audit --prompt 'two\n    ## lines'\n" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (math.nan, "NaN"),
        (math.inf, "infinite"),
        (-math.inf, "-infinite"),
        (0.0, "0"),
        (1.0, "1"),
        (0.00123456, "0.00123"),
        (0.000123456, "1.23e-04"),
        (-123456.0, "-1.23e+05"),
    ],
)
def test_figures_have_three_digits_or_a_word(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_an_answer_that_is_not_known_is_not_false() -> None:
    assert [yes_no(value) for value in (True, False, None)] == ["True", "False", "not measured"]


def test_brackets_stand_as_they_are_and_make_no_link() -> None:
    assert _cell("slots [0] of x[1]") == "slots [0] of x[1]"
    assert "](" not in _cell("[here](http://elsewhere)")
    assert "][" not in _cell("[here][there]")


def test_several_reasons_are_settled_once() -> None:
    decision = judge(
        synthetic_run(edits=[with_first(touches(Site.LOGITS, position=17, pass_name=None), math.nan)])
    ).decision
    many = dataclasses.replace(decision, verdict=Verdict.INCONCLUSIVE, reasons=("one broke", "another follows"))

    said = recommend(many)

    assert sum("Settle this first" in line for line in said) == 1
    assert any(line == "Then: another follows." for line in said)


def test_scores_of_a_key_that_one_side_hides_are_not_called_nan() -> None:
    hidden = with_first(
        touches(Site.ATTN_SCORES, layer=1, position=17, pass_name="decode", label="as_designed"), -math.inf
    )
    run = synthetic_run(edits=[hidden])

    found = [text for mode in ("as_designed",) for text in broken_values(run.table, mode)]

    assert any("of scores have keys that only one side hides" in text for text in found)
    assert not any("NaN" in text for text in found)
