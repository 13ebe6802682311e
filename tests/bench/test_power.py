"""How sharp the directed tests are, on records written by hand."""

from kvdrift_bench.figures.power import Calibration, Estimate, Minimum, measure_power
from kvdrift_bench.figures.render import render_faults
from kvdrift_bench.figures.summary import summarise
from kvdrift_bench.run.records import Record
from tests.bench.test_summary import judged, record


def clean(p_value: float | None, **options: object) -> Record:
    item = judged("STRUCTURAL_DRIFT", p_value=p_value, **options)
    return record("clean", "clean", item)


def tables(records: list[Record]) -> str:
    """The document up to the names of runs."""
    return render_faults(summarise(records), "c", {}).partition("<details>")[0]


def test_p_values_of_clean_runs_are_counted_and_those_of_faults_are_not() -> None:
    records = [clean(0.03), clean(0.7), clean(None), record("f", item=judged(p_value=1e-4))]
    found = {item.level: item for item in measure_power(records).calibration}
    assert found[0.01] == Calibration(0.01, 2, 0)
    assert found[0.05] == Calibration(0.05, 2, 1)
    assert found[0.05].interval[0] < 0.5 < found[0.05].interval[1]


def test_the_minimum_of_a_cause_is_the_median_of_its_setting() -> None:
    records = [clean(0.5, minimum={"score_scale": size}) for size in (1e-4, 3e-4, 9e-4)]
    records.append(record("f", item=judged(minimum={"score_scale": 1.0})))
    assert measure_power(records).minima == [Minimum("score_scale", "m bfloat16 sdpa", 3e-4, 3)]


def test_a_planted_size_stands_beside_its_estimate() -> None:
    seen = record("a", item=judged(p_value=1e-4, estimates={"c": 9e-4, "other": 5.0}), amount=1e-3)
    missed = record("b", item=judged(p_value=0.5), amount=1e-4)
    no_factor = record("e", item=judged(p_value=1e-4, estimates={"c": 1.0}))
    assert measure_power([seen, missed, no_factor]).estimates == [
        Estimate("a", "m bfloat16 sdpa", 1e-3, 1, (9e-4,), None, 0),
        Estimate("b", "m bfloat16 sdpa", 1e-4, 1, (), None, 0),
    ]


def test_a_size_above_the_stated_minimum_that_was_not_seen_is_listed() -> None:
    def missed(name: str, amount: float, **options: object) -> Record:
        item = judged("EXACT", p_value=0.5, minimum={"c": 5e-4})
        return record(name, item=item, amount=amount, **{"in_all_layers": True, **options})

    records = [missed("lie", 1e-3), missed("below", 1e-4), missed("one_layer", 1e-2, in_all_layers=False)]
    assert {item.fault: (item.minimum, item.unkept) for item in measure_power(records).estimates} == {
        "lie": (5e-4, 1),
        "below": (5e-4, 0),
        "one_layer": (None, 0),
    }
    text = tables(records)
    assert "- lie (m bfloat16 sdpa): +0.001 planted, 5.0e-04 stated, not seen in 1 of 1" in text
    assert "5.0e-04 (fault below)" in text
    assert "- below" not in text
    assert "- one_layer" not in text


def test_tables_say_what_was_missed_and_nothing_where_nothing_is_known() -> None:
    missed = record("b", item=judged(p_value=0.5), amount=1e-4)
    text = tables([missed, clean(0.3, minimum={"sink_missing": 0.5})])
    assert "not seen" in text
    assert "| sink_missing | 5.0e-01 |" in text
    nothing = tables([record("f")])
    assert "p-values of the clean runs" not in nothing
    assert "Minimum detectable effects" not in nothing
    assert "Sizes that were planted" not in nothing
