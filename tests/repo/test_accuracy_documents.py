"""What docs/accuracy says of all settings together is the sum of what the command wrote into each document."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "accuracy"
APART = {"README.md", "compare.md", "gate.md", "kernels.md", "logprobs.md", "promises.md", "scenarios.md", "servers.md"}
COUNT = r"\| false alarms on clean {} \| [^|]*\((\d+) of (\d+);"


def counted(kind: str) -> tuple[int, int]:
    """Alarms and runs with the ladder, the first column, over all documents."""
    pages = [page for page in sorted(DOCS.glob("*.md")) if page.name not in APART]
    found = [re.search(COUNT.format(kind), page.read_text()) for page in pages]
    assert len(found) == 7
    assert all(found)
    return sum(int(item[1]) for item in found if item), sum(int(item[2]) for item in found if item)


def test_the_false_alarms_of_all_settings_are_added_up() -> None:
    (alarms, runs), (twin_alarms, twins) = counted("runs"), counted("twins")
    text = " ".join((DOCS / "README.md").read_text().split())

    assert alarms + twin_alarms == 0
    assert f"have {runs} clean runs and {twins} harmless changes" in text
    most = 100.0 * (1.0 - 0.05 ** (1.0 / (runs + twins)))
    assert f"at most {most:.2f} % of such audits alarm" in text
    assert f"0 in {runs + twins}" in text
