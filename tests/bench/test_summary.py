"""The figures of a benchmark, on records written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvdrift.errors import UsageError
from kvdrift_bench.figures.curves import curves_of
from kvdrift_bench.figures.document import FAULTS, write_drawings
from kvdrift_bench.figures.intervals import exact_interval
from kvdrift_bench.figures.promises import check_promises
from kvdrift_bench.figures.render import render_faults
from kvdrift_bench.figures.shares import Share, shown
from kvdrift_bench.figures.summary import as_json, summarise
from kvdrift_bench.peers.summary import area_under_curve, first_beyond, found_where, pooled_curve, roc_points
from kvdrift_bench.run.records import Judged, PeerRecord, Record, Step


def judged(verdict: str = "MISMATCH", **options: Any) -> Judged:
    right = verdict == "MISMATCH" or None
    settings = {"right_address": right, "right_layer": right, "right_cause": right, "above": True, "cause": "c"}
    return Judged(verdict=verdict, **settings | options)


def record(name: str = "f", kind: Any = "fault", item: Judged | None = None, **options: Any) -> Record:
    settings: dict[str, Any] = {
        "model": "m",
        "dtype": "bfloat16",
        "attention": "sdpa",
        "prompts": "set_0",
        "ladder": "both",
        "span": 4,
        "mechanism": "M01" if kind == "fault" else None,
        "cause": "c" if kind == "fault" else None,
        "places": [(0, "q_rope"), (0, "k_rope")] if kind == "fault" else [],
        "changed": 1 if kind == "fault" else 0,
        "kvdrift": {"ladder": item if item is not None else judged()},
    }
    return Record(name=name, kind=kind, **settings | options)


def peer(*alarms: float | None, layer: int = 0, flagged: bool = False) -> PeerRecord:
    steps = [Step(layer, "q_rope", alarm) for alarm in alarms]
    return PeerRecord(flagged=flagged, first=(layer, "q_rope") if flagged else None, steps=steps)


def test_detection_localisation_and_diagnosis_are_counted() -> None:
    records = [
        record("a"),
        record("b", item=judged(right_address=False)),
        record("c", item=judged(right_address=False, right_layer=False, right_cause=False, cause="other")),
        record("d", item=judged("STRUCTURAL_DRIFT", above=False)),
    ]
    figures = summarise(records).ways["ladder"]

    assert figures.detected == Share(3, 4)
    assert figures.detected_above == Share(3, 3)
    assert figures.right_layer == Share(2, 3)
    assert figures.right_address == Share(1, 3)
    assert figures.right_cause == Share(2, 3)
    assert figures.named_wrongly == 1
    assert [name.split(" ")[0] for name in figures.missed] == ["d"]
    assert len(figures.misplaced) == 2


def test_a_wrong_localisation_lowers_the_figure() -> None:
    right = [record(str(index)) for index in range(9)]
    wrong = record("wrong", item=judged(right_address=False, right_layer=False))

    before = summarise(right).ways["ladder"]
    after = summarise([*right, wrong]).ways["ladder"]

    assert (before.right_layer.share, before.right_address.share) == (1.0, 1.0)
    assert (after.right_layer.share, after.right_address.share) == (0.9, 0.9)
    assert after.detected.share == 1.0


def test_a_missed_fault_above_the_stated_minimum_lowers_that_figure() -> None:
    figures = summarise([record("a"), record("b", item=judged("STRUCTURAL_DRIFT"))]).ways["ladder"]

    assert figures.detected_above == Share(1, 2)


def test_nothing_measured_is_not_everything_right() -> None:
    empty = summarise([])
    assert empty.ways == {}
    assert "100" not in render_faults(empty, "kvdrift-bench faults", {})

    only_clean = summarise([record("clean", "clean", judged("EXACT"))]).ways["ladder"]
    assert only_clean.detected == Share(0, 0)
    assert only_clean.detected.share is None
    assert only_clean.detected.interval == (0.0, 1.0)
    assert shown(only_clean.detected) == "– (0 of 0)"


def test_false_alarms_are_counted_apart_for_clean_runs_and_twins() -> None:
    records = [
        record("clean", "clean", judged("EXACT")),
        record("clean", "clean", judged("MISMATCH"), prompts="set_1"),
        record("twin", "twin", judged("MISMATCH")),
        record("other", "twin", judged("INCONCLUSIVE", reasons=["blind"])),
    ]
    figures = summarise(records).ways["ladder"]

    assert (figures.clean, figures.twins, figures.unsure) == (Share(1, 2), Share(1, 2), Share(1, 4))
    of_dtype = figures.by_dtype["bfloat16"]
    assert (of_dtype.clean, of_dtype.twins) == (Share(1, 2), Share(1, 2))
    assert figures.doubts == {"twin at bfloat16: blind": 1}


def test_no_verdict_is_neither_a_find_nor_a_miss() -> None:
    records = [
        record("a"),
        record("b", item=judged("STRUCTURAL_DRIFT")),
        record("c", item=judged("INCONCLUSIVE", reasons=["blind"])),
    ]
    figures = summarise(records).ways["ladder"]

    assert (figures.detected, figures.undecided) == (Share(1, 3), Share(1, 3))
    assert (figures.detected_above, figures.undecided_above) == (Share(1, 3), Share(1, 3))
    assert [name.split(" ")[0] for name in figures.missed] == ["b"]
    assert figures.doubts == {"fault at bfloat16: blind": 1}


def test_a_run_that_broke_off_is_no_success() -> None:
    broken = record("a", error="ValueError: no", kvdrift={})
    clean = record("clean", "clean", error="ValueError: no", kvdrift={})
    summary = summarise([broken, clean, record("b")])

    assert summary.ways["ladder"].detected == Share(1, 2)
    assert summary.ways["ladder"].unsure == Share(1, 1)
    assert len(summary.broken) == 2


def test_a_fault_without_effect_or_not_run_is_named_and_not_counted() -> None:
    records = [record("a", changed=0), record("b", skipped="needs the scenario beam", kvdrift={}), record("c")]
    summary = summarise(records)

    assert summary.ways["ladder"].detected == Share(1, 1)
    assert summary.without_effect == ["a (m bfloat16 sdpa)"]
    assert summary.skipped == {"needs the scenario beam": 1}


def test_figures_are_given_by_class_and_dtype() -> None:
    records = [
        record("a"),
        record("b", item=judged("EXACT"), dtype="float32"),
        record("c", mechanism="M02", item=judged(right_layer=False)),
    ]
    figures = summarise(records).ways["ladder"]

    shares = {key: (f.detected, f.right_layer, f.right_address) for key, f in figures.by_class.items()}
    assert shares == {
        "M01": (Share(1, 2), Share(1, 1), Share(1, 1)),
        "M02": (Share(1, 1), Share(0, 1), Share(1, 1)),
    }
    assert figures.by_dtype["float32"].detected == Share(0, 1)
    assert figures.by_fault["c"].detected == Share(1, 1)


def test_runs_on_several_sets_are_counted_by_fault() -> None:
    records = [record("a"), record("a", item=judged("EXACT"), prompts="set_1"), record("b")]
    summary = summarise(records)

    assert summary.ways["ladder"].by_fault["a"].detected == Share(1, 2)
    assert summary.ways["ladder"].missed == ["a on set_1 (m bfloat16 sdpa): EXACT"]
    assert "### By fault" in render_faults(summary, "c", {}, by_fault=True)
    assert "### By fault" not in render_faults(summary, "c", {})


def test_a_promise_is_met_by_what_was_measured_and_by_nothing_else() -> None:
    nine = [record(str(index)) for index in range(9)]
    kept = {p.what: p.is_kept for p in check_promises(summarise([*nine, record("clean", "clean", judged("EXACT"))]))}
    assert kept["faults above the stated minimum, with the ladder"] is True
    assert kept["false alarms on clean runs, with the ladder"] is True
    assert kept["false alarms on clean twins, with the ladder"] is None
    assert kept["faults above the stated minimum, half-precision dtype alone"] is None

    wrong = [*nine, record("x", item=judged("INCONCLUSIVE")), record("clean", "clean", judged())]
    broken = {p.what: p.is_kept for p in check_promises(summarise(wrong))}
    assert broken["faults above the stated minimum, with the ladder"] is False
    assert broken["false alarms on clean runs, with the ladder"] is False


def test_only_half_precision_is_promised_anything_without_the_ladder() -> None:
    records = [
        record("a", kvdrift={"native": judged()}),
        record("b", kvdrift={"native": judged("EXACT")}, dtype="float32"),
    ]
    kept = {p.what: p.share for p in check_promises(summarise(records))}

    assert kept["faults above the stated minimum, half-precision dtype alone"] == Share(1, 1)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # The 2.5 % and 97.5 % quantiles of the beta distribution, from tables.
    [(0, 10, 0.0, 0.30850), (10, 10, 0.69150, 1.0), (1, 10, 0.00253, 0.44502), (5, 10, 0.18709, 0.81291)],
)
def test_the_exact_interval(hits: int, trials: int, low: float, high: float) -> None:
    assert exact_interval(hits, trials) == pytest.approx((low, high), abs=1e-5)


def test_the_exact_interval_of_a_large_sample() -> None:
    assert exact_interval(0, 500)[1] == pytest.approx(1.0 - 0.025 ** (1.0 / 500.0), rel=1e-9)
    with pytest.raises(ValueError, match=r"6.* must not be greater than .*5"):
        exact_interval(6, 5)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    assert area_under_curve([0.0, 2.0], [1.0, 3.0]) == 0.75
    assert area_under_curve([1.0], [1.0]) == 0.5
    assert area_under_curve([-math.inf, 0.0], [math.inf]) == 1.0
    assert area_under_curve([], [1.0]) is None


def test_the_curve_runs_from_no_flag_to_all_flags() -> None:
    points = roc_points([0.0, 2.0], [1.0, 3.0])

    assert points == [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]


def test_peers_are_judged_at_their_own_and_at_their_best_threshold() -> None:
    rule = "polygraphy_l2"
    records = [
        record("clean", "clean", judged("EXACT"), peers={rule: peer(0.1, 0.2, flagged=True)}),
        record("twin", "twin", judged("EXACT"), peers={rule: peer(0.25, flagged=True)}),
        record("a", peers={rule: peer(0.3, flagged=True)}),
        record("b", peers={rule: peer(0.15, flagged=True)}),
        record("c", peers={rule: peer(0.3, layer=2, flagged=True)}),
        record("d", peers={rule: peer(None, flagged=True)}),
    ]
    (figures,) = summarise(records).peers

    assert (figures.found, figures.placed, figures.clean_alarms, figures.twin_alarms) == (4, 3, 1, 1)
    assert figures.best_threshold == 0.2
    assert (figures.best_found, figures.best_placed, figures.best_twin_alarms) == (3, 2, 1)
    assert (figures.quiet_found, figures.quiet_placed) == (3, 2)
    assert figures.auc == 0.75
    assert figures.found_at["0"] == 0.75


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    records = [
        record("clean", "clean", judged("EXACT"), peers={"polygraphy_l2": peer(0.1)}),
        record("a", peers={"polygraphy_l2": peer(0.3, flagged=True)}),
    ]
    text = render_faults(summarise(records), "kvdrift-bench faults", {"cores": "2"})

    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 8
    for table in tables:
        assert {line.replace("\\|", "").count("|") for line in table} == {table[0].count("|")}


def test_the_first_place_beyond_a_threshold_comes_from_the_steps() -> None:
    steps = PeerRecord(flagged=True, steps=[Step(0, "q_rope", 0.1), Step(1, "q_rope", 0.5), Step(2, "logits", None)])

    assert first_beyond(steps, 0.05) == (0, "q_rope")
    assert first_beyond(steps, 0.1) == (1, "q_rope")
    assert first_beyond(steps, 1e300) == (2, "logits")


def test_the_summary_is_strict_json_with_intervals() -> None:
    plain = as_json(summarise([record("a", peers={"polygraphy_snr": peer()})]))

    assert json.loads(json.dumps(plain, allow_nan=False)) == json.loads(json.dumps(plain))
    assert plain["ways"]["ladder"]["detected"]["interval_95"] == [pytest.approx(0.025), 1.0]
    assert plain["ways"]["ladder"]["by_class"]["M01"]["right_layer"]["hits"] == 1


def test_the_figures_go_between_the_markers_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.md"
    path.write_text(f"before\n{FAULTS.begin}\nold\n{FAULTS.end}\nafter\n")

    FAULTS.write(path, "new\n")
    FAULTS.write(path, "newer\n")

    assert path.read_text() == f"before\n{FAULTS.begin}\n\nnewer\n\n{FAULTS.end}\nafter\n"
    path.write_text(f"{FAULTS.end}\n{FAULTS.begin}\n")
    with pytest.raises(UsageError, match="marker"):
        FAULTS.write(path, "new\n")


def test_markers_are_added_to_a_document_without_them(tmp_path: Path) -> None:
    FAULTS.write(tmp_path / "new.md", "figures\n")

    assert (tmp_path / "new.md").read_text() == f"{FAULTS.begin}\n\nfigures\n\n{FAULTS.end}\n"


def test_curves_of_models_are_averaged_at_equal_shares_of_false_alarms() -> None:
    sharp, blunt = [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)], [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (1.0, 1.0)]

    assert pooled_curve([(sharp, 3), (blunt, 1)]) == [(0.0, 0.75), (0.5, 1.0), (1.0, 1.0)]
    assert found_where(blunt, 0.49) == 0.0
    assert pooled_curve([([], 3)]) == []


def test_the_curves_are_tabled_and_drawn_with_twins_and_without(tmp_path: Path) -> None:
    rule = "polygraphy_l2"
    records = [
        record("clean", "clean", judged("EXACT"), peers={rule: peer(0.1)}),
        record("twin", "twin", judged("EXACT"), peers={rule: peer(0.25)}),
        record("a", peers={rule: peer(0.2)}),
        record("b", peers={rule: peer(0.3)}),
    ]
    summary = summarise(records)
    (curves,) = curves_of(summary)
    drawn = write_drawings(tmp_path / "accuracy.md", [curves])
    text = render_faults(summary, "c", {}, drawn=drawn)

    assert "| polygraphy_l2 | 50.0 % | 50.0 % | 50.0 % | 50.0 % | 50.0 % | 50.0 % | 100.0 % |" in text
    assert "| polygraphy_l2 | 100.0 % |" in text
    assert "| **kvdrift**, with the ladder | 100.0 % |" in text
    assert drawn == {"bfloat16": "accuracy-roc-bfloat16.svg"}
    assert "](accuracy-roc-bfloat16.svg)" in text
    figure = ElementTree.fromstring((tmp_path / "accuracy-roc-bfloat16.svg").read_text())
    assert figure.tag.endswith("svg")
    words = [element.text for element in figure.iter() if element.tag.endswith("text")]
    assert rule in words
