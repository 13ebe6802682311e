"""Self-noise is shown beside drift, and decides nothing."""

from kvdrift.instruments.selfnoise import judge_self_noise
from tests.support.traces import synthetic_run


def test_drift_is_shown_in_units_of_self_noise() -> None:
    run = synthetic_run()
    evidence = judge_self_noise(run.table, "as_designed", run.info.dtype)
    assert evidence.supports is None
    assert evidence.valid
    assert evidence.statistic is not None
    assert 0.1 < evidence.statistic < 10.0


def test_prefills_that_repeat_themselves_show_no_noise() -> None:
    run = synthetic_run(noise=0.0)
    evidence = judge_self_noise(run.table, "as_designed", run.info.dtype)
    assert evidence.statistic is None
    assert "bit for bit" in evidence.text


def test_without_a_second_prefill_it_says_so() -> None:
    run = synthetic_run()
    run.table.forget("self_noise")
    evidence = judge_self_noise(run.table, "as_designed", run.info.dtype)
    assert not evidence.valid
