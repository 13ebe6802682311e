"""Modules stay small enough to be read in one sitting."""

from pathlib import Path

MAX_LINES = 500


def too_long(folder: Path) -> dict[str, int]:
    """Return the modules under `folder` with more than MAX_LINES lines, and how many each has."""
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py")}
    assert counts, f"no module under {folder}"
    return {str(path.relative_to(folder)): count for path, count in counts.items() if count > MAX_LINES}


def test_no_module_has_more_than_500_lines(root: Path) -> None:
    assert too_long(root / "src") == {}


def test_that_the_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("pass\n" * 501)
    (tmp_path / "short.py").write_text("pass\n" * 500)
    assert too_long(tmp_path) == {"long.py": 501}
