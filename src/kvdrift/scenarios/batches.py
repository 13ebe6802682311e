"""Scenarios of several rows in one cache: each row against the same row alone."""

from __future__ import annotations

from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Stage
from kvdrift.vocabulary.plan import LONGEST_ROW

_LEAST = 6  # tokens of a row at least: one is cut by three, and one to three
_DECODED = 2  # tokens of a row that follow its prompt one by one


def _neighbours(stage: Stage, length: int, n_rows: int) -> list[tuple[int, ...]]:
    """Return texts of one length: the prompt's, those of other prompts that are long enough, and made-up ones."""
    texts = [stage.text(length)]
    texts += [other[:length] for other in stage.others if len(other) >= length]
    texts += [stage.different(length, salt=10 + row) for row in range(n_rows)]
    return texts[:n_rows]


def _length(stage: Stage) -> int:
    """How many tokens a row has: the longest prompt, up to the limit of rows, and those that are decoded behind it."""
    length = min(LONGEST_ROW, len(stage.prompt)) + _DECODED
    if stage.max_positions is not None:
        length = min(length, stage.max_positions - _DECODED)  # beams go on behind it
    return max(_LEAST, length)


def batch(stage: Stage) -> None:
    """Three rows of one length; then the first row again, with other neighbours."""
    stage.need("batch")
    length = _length(stage)
    first, second, third = _neighbours(stage, length, 3)
    for name, rows in (("three rows", [first, second, third]), ("other neighbours", [third, first])):
        with stage.rows(len(rows), name, length=length) as batch:
            batch.extend([row[:-2] for row in rows])
            batch.extend([row[-2:-1] for row in rows], compare=True)
            batch.extend([row[-1:] for row in rows], compare=True)


def batch_padded(stage: Stage) -> None:
    """Rows of different length, padded on the left: prefill and decode, each row against itself alone."""
    stage.need("batch", "padding")
    length = _length(stage)
    texts = _neighbours(stage, length, 3)
    rows = [texts[0], texts[1][: length - 3], texts[2][:3]]
    with stage.rows(3, "padded", length=length) as batch:
        batch.extend([row[:-2] for row in rows], compare=True)
        batch.extend([row[-2:-1] for row in rows], compare=True)
        batch.extend([row[-1:] for row in rows], compare=True)


def beams(stage: Stage) -> None:
    """Rows change places and one is taken twice, as the survivors of beam search do."""
    stage.need("batch", "reorder")
    length = _length(stage)
    rows = _neighbours(stage, length, 3)
    tails = [stage.different(2, salt=20 + row) for row in range(3)]
    with stage.rows(3, "beams", length=length + 2) as batch:
        batch.extend([row[:-1] for row in rows])
        batch.extend([row[-1:] for row in rows])
        batch.reorder([2, 0, 0])
        batch.extend([tail[:1] for tail in tails], compare=True)
        batch.reorder([1, 2, 0])
        batch.extend([tail[1:] for tail in tails], compare=True)


def select_rows(stage: Stage) -> None:
    """A row in the middle of a batch ends, and the others go on."""
    stage.need("batch", "select")
    length = _length(stage)
    rows = _neighbours(stage, length, 3)
    with stage.rows(3, "selected", length=length) as batch:
        batch.extend([row[:-2] for row in rows])
        batch.select([0, 2])
        for step in (-2, -1):
            batch.extend([[rows[0][step]], [rows[2][step]]], compare=True)


def duplicate_rows(stage: Stage) -> None:
    """The same row twice in a batch, apart from each other."""
    stage.need("batch")
    length = _length(stage)
    text, other = _neighbours(stage, length, 2)
    rows = [text, other, text]
    with stage.rows(3, "twins", length=length) as batch:
        batch.extend([row[:-2] for row in rows])
        for step in (-2, -1):
            batch.extend([[row[step]] for row in rows], compare=True)


BATCHES = (
    Scenario("batch", "rows of a batch that read or write each other's cache", batch),
    Scenario(
        "batch_padded",
        "padding that is seen, positions that count it, windows that start at it",
        batch_padded,
        "models that take an attention mask",
    ),
    Scenario("beams", "a cache that does not follow the order of the surviving beams", beams),
    Scenario("select_rows", "rows that are mixed up when one of them ends", select_rows, "caches that can select rows"),
    Scenario("duplicate_rows", "rows whose values depend on their place in the batch", duplicate_rows),
)
