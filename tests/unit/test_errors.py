"""Every error has its exit code, and a base by which it can be caught."""

from typing import Any

import pytest

from kvdrift import errors
from kvdrift.errors import (
    AlignmentError,
    CaptureError,
    EngineUnavailable,
    KvdriftError,
    TraceError,
    UsageError,
    VerdictError,
)
from kvdrift.vocabulary.evidence import Verdict


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (EngineUnavailable, 3), (CaptureError, 4), (TraceError, 5), (AlignmentError, 5)],
)
def test_each_error_has_its_exit_code(error: type[KvdriftError], code: int) -> None:
    assert error.exit_code == code
    assert error("why").exit_code == code
    assert str(error("why")) == "why"


def test_every_error_is_a_kvdrift_error_and_documented() -> None:
    found: set[type[Any]] = {
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)
    }
    found -= {errors.NotApplicable}  # a finding of a scenario, which no user is shown as an error
    known = {KvdriftError, UsageError, EngineUnavailable, CaptureError, TraceError, AlignmentError, VerdictError}
    assert found == known
    assert all(issubclass(item, KvdriftError) and item.__doc__ for item in found)
    assert errors.__doc__ is not None
    for item in found - {KvdriftError, VerdictError}:  # whose exit code is that of its verdict
        assert f"{item.__name__:<{20 if item is not AlignmentError else 16}}{item.exit_code}" in errors.__doc__


def test_traces_that_cannot_be_paired_are_bad_traces() -> None:
    assert issubclass(AlignmentError, TraceError)


def test_no_error_shares_its_exit_code_with_a_pass_or_with_inconclusive() -> None:
    passes = {verdict.exit_code for verdict in Verdict}
    assert passes == {0, 1, 6}
    assert not passes & {error.exit_code for error in (UsageError, EngineUnavailable, CaptureError, TraceError)}
