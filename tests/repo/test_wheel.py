"""The wheel as a user installs it: kvdrift works where its benchmark is not, and the benchmark says what it lacks."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvdrift.cli.app import SUBCOMMANDS
from tests.support.command import llama, prompts
from tests.support.matrix import further

__all__ = ["llama", "prompts"]

VERBS = [
    command.callback.__name__
    for subcommand in SUBCOMMANDS
    for command in subcommand.registered_commands
    if command.callback is not None
]
# Other installations of kvdrift, what an extra brings, and what a .pth file would bring in.
NOT_LINKED = ("kvdrift", "_kvdrift", "scipy")


@dataclass(frozen=True)
class Installed:
    """A virtual environment in which the wheel was installed."""

    folder: Path

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder), "platbase": str(self.folder)}))

    def run(self, command: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment with nothing of the clone on the path."""
        lean = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
        return subprocess.run(
            [self.folder / "bin" / command, *arguments],
            cwd=cwd,
            env={**lean, "COLUMNS": "100", "TERM": "dumb"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


def run_here(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone."""
    folder = tmp_path_factory.mktemp("dist")
    run_here("hatchling", "build", "-t", "wheel", "-d", folder, cwd=root)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def whole(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own, with the dependencies of this one but for scipy."""
    installed = Installed(tmp_path_factory.mktemp("environments") / "whole")
    venv.create(installed.folder, with_pip=False)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(NOT_LINKED) and entry.suffix != ".pth":
            (installed.packages / entry.name).symlink_to(entry)
    python = installed.folder / "bin" / "python"
    run_here("pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    return installed


@pytest.fixture(scope="module")
def installed(wheel: Path, whole: Installed, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The same without the package of the benchmark."""
    bare = Installed(tmp_path_factory.mktemp("environments") / "bare")
    venv.create(bare.folder, with_pip=False)
    for entry in whole.packages.iterdir():
        if entry.is_symlink():
            (bare.packages / entry.name).symlink_to(entry.readlink())
    python = bare.folder / "bin" / "python"
    run_here("pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    shutil.rmtree(bare.packages / "kvdrift_bench")
    return bare


def test_the_wheel_holds_two_packages_and_their_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())

    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"kvdrift", "kvdrift_bench"}
    assert "kvdrift/py.typed" in names
    root = Path(__file__).resolve().parents[2] / "src"
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names


def test_kvdrift_is_the_installed_one_and_its_benchmark_is_not_there(installed: Installed, tmp_path: Path) -> None:
    found = installed.run("python", "-c", "import kvdrift; print(kvdrift.__file__); kvdrift.audit", cwd=tmp_path)
    missing = installed.run("python", "-c", "import kvdrift_bench", cwd=tmp_path)

    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == installed.packages / "kvdrift" / "__init__.py"
    assert "No module named 'kvdrift_bench'" in missing.stderr


def test_the_verbs_are_known() -> None:
    assert {"audit", "judge", "scenarios", "show"} <= set(VERBS)


@pytest.mark.parametrize("verb", ["", VERBS[0], *further(*VERBS[1:])])
def test_every_verb_has_its_help(installed: Installed, tmp_path: Path, verb: str) -> None:
    done = installed.run("kvdrift", *verb.split(), "--help", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "Exit codes: " in done.stdout


def test_scenarios_are_listed(installed: Installed, tmp_path: Path) -> None:
    done = installed.run("kvdrift", "scenarios", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("decode ")


@pytest.mark.parametrize(("name", "code"), [("own_clean", 0), ("own_semantic", 1), ("greta", None)])
def test_recorded_runs_are_judged(root: Path, installed: Installed, tmp_path: Path, name: str, code: int) -> None:
    with tarfile.open(root / "tests" / "golden" / "traces" / f"{name}.tar.xz") as file:
        file.extractall(tmp_path / "run", filter="data")
    expected = tmp_path / "run" / "expected-report.json"
    report = json.loads(expected.read_text(encoding="utf-8"))
    expected.unlink()
    if code is not None:
        assert report["exit_code"] == code

    done = installed.run("kvdrift", "judge", "--markdown", "run", cwd=tmp_path)

    assert done.returncode == report["exit_code"], done.stderr
    assert f"**Verdict**: {report['verdict']}" in done.stdout


def test_a_model_is_audited_and_its_report_shown(
    installed: Installed, llama: Path, prompts: Path, tmp_path: Path
) -> None:
    options = ("--prompts", prompts, "--span", "1", "--out", "run")

    audited = installed.run("kvdrift", "audit", llama, *options, cwd=tmp_path)
    shown = installed.run("kvdrift", "show", "--markdown", "run", cwd=tmp_path)
    judged = installed.run("kvdrift", "judge", "--markdown", "run", cwd=tmp_path)

    assert (audited.returncode, audited.stderr) == (0, "")
    assert "report:        run/report.html\n" in audited.stdout
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == judged.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("faults", "--help"), ("faults",)])
def test_the_benchmark_without_its_extra_says_what_to_install(
    whole: Installed, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = whole.run("kvdrift-bench", *arguments, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "kvdrift: the benchmark needs 'scipy'; pip install 'kvdrift[bench]'\n"


def test_the_benchmark_with_its_extra_has_its_help(whole: Installed, tmp_path: Path) -> None:
    import scipy

    (whole.packages / "scipy").symlink_to(Path(scipy.__file__).parent)
    try:
        done = whole.run("kvdrift-bench", "--help", cwd=tmp_path)
    finally:
        (whole.packages / "scipy").unlink()

    assert (done.returncode, done.stderr) == (0, "")
    assert "faults" in done.stdout
