"""The table of `./run bench speed`: what was measured is kept, and what was not says so."""

from pathlib import Path

import pytest

from benchmarks.table import Kept, Piece, Row


def piece(name: str, values: list[float]) -> tuple[Piece, list[int]]:
    """A piece of one row, and the repetitions that it was asked for each time that it was measured."""
    asked: list[int] = []

    def measure(repeats: int) -> list[Row]:
        asked.append(repeats)
        if not values:
            raise RuntimeError("broken off")
        return [Row(name, "ratio", 1.5, values, note="a note")]

    return Piece(name, measure, (Row(name, "ratio", 1.5),)), asked


def test_a_run_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    done, asked = piece("done", [1.0, 2.0])
    broken, _ = piece("broken", [])
    kept = Kept(tmp_path / "folder" / "rows.json", "state")
    kept.measure(done, 2)
    with pytest.raises(RuntimeError, match="broken off"):
        kept.measure(broken, 2)

    again = Kept(tmp_path / "folder" / "rows.json", "state")
    assert again.is_known(done)
    assert not again.is_known(broken)
    assert asked == [2]
    assert [row.line() for row in again.rows(done)] == ["| done | ratio | <= 1.5 | 1.5 (1 to 2) | met; a note |"]
    assert again.rows(broken)[0].values == ()
    assert again.seconds([done, broken]) >= 0.0


def test_two_runs_at_once_keep_what_both_measured(tmp_path: Path) -> None:
    first, _ = piece("first", [1.0])
    second, _ = piece("second", [2.0])
    runs = [Kept(tmp_path / "rows.json", "state") for _ in range(2)]
    runs[0].measure(first, 1)
    runs[1].measure(second, 1)

    assert all(Kept(tmp_path / "rows.json", "state").is_known(item) for item in (first, second))


def test_what_was_measured_of_other_code_is_named(tmp_path: Path) -> None:
    done, _ = piece("done", [3.0])
    Kept(tmp_path / "rows.json", "before").measure(done, 1)
    kept = Kept(tmp_path / "rows.json", "now")

    assert not kept.is_known(done)
    assert kept.stale([done]) == ["done"]
    kept.measure(done, 1)
    assert kept.stale([done]) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Row("a", "b", 2.0, [3.0], " s"), "| a | b | <= 2 s | 3 s | falls short |"),
        (Row("a", "b", 2.0, [3.0], at_least=True), "| a | b | >= 2 | 3 | met |"),
        (Row("a", "b", 2.0, note="takes long"), "| a | b | <= 2 | | not measured: takes long |"),
    ],
)
def test_a_row_says_whether_its_goal_is_met(row: Row, text: str) -> None:
    assert row.line() == text
