"""How sharp the directed tests are, on records written by hand."""

from kvdrift.bench.power import Calibration, Estimate, Minimum, measure_power
from kvdrift.bench.power_tables import power_tables
from tests.bench.test_summary import judged, record


def clean(p_value: float | None, **options: object) -> object:
    item = judged("STRUCTURAL_DRIFT", p_value=p_value, **options)
    return record("clean", "clean", item)


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
        Estimate("a", "m bfloat16 sdpa", 1e-3, 9e-4),
        Estimate("b", "m bfloat16 sdpa", 1e-4, None),
    ]


def test_tables_say_what_was_missed_and_nothing_where_nothing_is_known() -> None:
    missed = record("b", item=judged(p_value=0.5), amount=1e-4)
    text = "\n".join(power_tables(measure_power([missed, clean(0.3, minimum={"sink_missing": 0.5})])))
    assert "not seen" in text
    assert "| sink_missing | 5.0e-01 |" in text
    assert power_tables(measure_power([record("f")])) == []
