"""Releases with a known bug: the catalogue holds together, a pair is told apart, and what is not to be had says so."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.zoo.build import registered
from kvdrift_bench.figures.history_page import history_page
from kvdrift_bench.run.history_child import HistoryAudit
from kvdrift_bench.run.history_runs import PairResult, ReleasePair, choose_pairs, history, run_pair, unpacked

FOLDER = Path(os.environ.get("KVDRIFT_RELEASES", "~/.cache/kvdrift/releases")).expanduser()


def wheel(folder: Path, version: str) -> Path:
    path = folder / f"mlx_lm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("mlx_lm/__init__.py", f"__version__ = {version!r}\n")
    return path


def result(before: str | None, after: str | None) -> PairResult:
    return PairResult(pair=history().pair[0], before=HistoryAudit(verdict=before), after=HistoryAudit(verdict=after))


def test_the_catalogue_has_a_wheel_a_model_and_a_reference_for_each_pair() -> None:
    known = history()

    assert Counter(pair.name for pair in known.pair).most_common(1)[0][1] == 1
    assert len(known.pair) >= 40
    for pair in known.pair:
        assert pair.model in (known.model if pair.package == "mlx-lm" else registered())
        releases = {f"{pair.package} {version}" for version in (pair.before, pair.after)}
        assert releases | {name for each in releases for name in known.beside.get(each, ())} <= set(known.wheels)
        assert pair.reference.startswith("https://github.com/")


def test_a_release_is_told_from_the_one_that_mends_it() -> None:
    (pair,) = choose_pairs(["llama-ring"])
    found = run_pair(pair, FOLDER)

    assert found.told_apart
    assert found.before.first_failure is not None
    assert found.before.first_failure.endswith("layer 0 / k_cache")
    assert found.before.cause == "key_lost_first"


@pytest.mark.matrix  # a further package, whose releases take longer to load
def test_a_release_of_transformers_is_told_from_the_one_that_mends_it() -> None:
    """The first one refuses the installed huggingface_hub, and gets another one beside it."""
    (pair,) = choose_pairs(["megatron-bert-causal"])
    found = run_pair(pair, FOLDER)

    assert found.told_apart, (found.before, found.after)
    assert found.before.first_failure is not None
    assert found.before.first_failure.endswith("layer 0 / attn_scores")
    assert found.before.cause == "not_causal"


@pytest.mark.matrix
def test_the_same_release_twice_is_not_told_apart() -> None:
    (pair,) = choose_pairs(["llama-ring"])
    found = run_pair(
        ReleasePair(**{name: getattr(pair, name) for name in pair.__struct_fields__} | {"before": pair.after}), FOLDER
    )

    assert not found.told_apart
    assert found.before.verdict == found.after.verdict


@pytest.mark.parametrize(("before", "after"), [("EXACT", "EXACT"), ("MISMATCH", "INCONCLUSIVE"), ("MISMATCH", None)])
def test_only_a_mismatch_and_a_pass_tell_releases_apart(before: str, after: str | None) -> None:
    assert not result(before, after).told_apart
    assert result("MISMATCH", "EXACT").told_apart


def test_a_wheel_that_is_not_the_published_one_is_not_unpacked(tmp_path: Path) -> None:
    path = wheel(tmp_path, "0.26.3")
    found = hashlib.sha256(path.read_bytes()).hexdigest()

    with pytest.raises(EngineUnavailable, match=f"has the SHA-256 {found}"):
        unpacked("mlx-lm", "0.26.3", tmp_path, offline=True)

    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_wheel_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"mlx-lm 0\.26\.3 is not in .*; leave --offline out"):
        unpacked("mlx-lm", "0.26.3", tmp_path, offline=True)


def test_a_release_that_breaks_off_is_an_error_and_no_verdict(tmp_path: Path) -> None:
    (pair,) = choose_pairs(["llama-ring"])
    for version in (pair.before, pair.after):
        (tmp_path / f"mlx-lm-{version}" / "mlx_lm").mkdir(parents=True)
        (tmp_path / f"mlx-lm-{version}" / "mlx_lm" / "__init__.py").write_text("__version__ = '0'\n")
    found = run_pair(pair, tmp_path, offline=True)

    assert found.before.verdict is None
    assert "mlx-lm 0 of" in (found.before.said or "")
    assert not found.told_apart
    assert "ERROR (its process ended with 1" in history_page([found], [], "x", "y")


def test_an_unknown_pair_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown pair 'nope'; --pair takes one of gemma3_text-window"):
        choose_pairs(["nope"])


def test_the_page_counts_pairs_and_references() -> None:
    page = history_page([result("MISMATCH", "EXACT"), result("EXACT", "EXACT")], [], "kvdrift-bench history", "mlx 1")

    assert "1 of 2 pairs told apart, of 1 public references" in page
    assert "[mlx-lm#390](https://github.com/ml-explore/mlx-lm/pull/390)" in page
