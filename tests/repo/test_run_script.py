"""./run as a user meets it before anything is installed; what it installs is tested by every run of these tests.

And what continuous integration makes of it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# The run of these tests may itself have been started by ./run with settings of its own.
OURS = ("KVDRIFT_VENV", "KVDRIFT_COVERAGE", "COVERAGE_PROCESS_CONFIG", "PYTHONPATH")
SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: text for name, text in os.environ.items() if name not in OURS}
    return subprocess.run(
        list(command),
        cwd=cwd,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A clone in a folder with a space in its name, with nothing installed."""
    folder = tmp_path / "my clone"
    folder.mkdir()
    for name in ("run", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, folder / name)
    return folder


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH with the ordinary tools and no Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "cat", "dirname", "grep", "ls", "mkdir", "mv", "rm"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)
    return tools


@pytest.fixture
def finished(clone: Path) -> Path:
    """An environment of level dev that looks complete, whose commands say how they were called."""
    venv = clone / "my venv"
    (venv / "bin").mkdir(parents=True)
    for command in ("python", "kvdrift"):
        script = venv / "bin" / command
        script.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$PYTHONPATH" "${0##*/}" "$@"\n')
        script.chmod(0o755)
    settings = "".join((clone / name).read_text() for name in ("constraints.txt", "pyproject.toml"))
    (venv / ".kvdrift-stamp").write_text(f"level dev\nvenv {venv}\n{settings}")
    return venv


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", ["run"])
def test_the_script_is_plain_posix_shell(root: Path, shell: str, script: str) -> None:
    command = [shell, "sh", "-n"] if shell == "busybox" else [shell, "-n"]
    done = run(*command, root / script)
    assert (done.returncode, done.stderr) == (0, "")


def test_that_the_shell_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("if true; then\n")
    assert run("sh", "-n", tmp_path / "script").returncode != 0


def test_the_ci_script_is_valid_bash(root: Path) -> None:
    assert run("bash", "-n", root / ".ci" / "run").returncode == 0


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_the_scripts_are_executable(root: Path, script: str) -> None:
    assert os.access(root / script, os.X_OK)


@pytest.mark.parametrize("arguments", [["help"], ["--help"], ["-h"], []])
def test_help_lists_the_verbs_and_installs_nothing(clone: Path, arguments: list[str]) -> None:
    done = run(clone / "run", *arguments)
    assert done.returncode == 0
    for verb in ("audit", "test", "check", "bench", "help"):
        assert f"\n  {verb}" in done.stdout
    assert not (clone / ".venv").exists()


def test_an_unknown_verb_is_a_usage_error(clone: Path) -> None:
    done = run(clone / "run", "adit")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kvdrift: unknown verb 'adit'\nusage: ./run VERB [ARGS]\n")
    assert not (clone / ".venv").exists()


def test_without_python_the_message_says_what_is_needed(clone: Path, bare_path: Path) -> None:
    done = run(clone / "run", "audit", PATH=str(bare_path))
    assert done.returncode == 3
    assert done.stderr == (
        "kvdrift: Python 3.11 or newer is needed, and no python3 on PATH is; install one and run this again\n"
    )
    assert not (clone / ".venv").exists()


def test_without_the_venv_module_the_message_says_how_to_get_it(clone: Path, bare_path: Path) -> None:
    python = bare_path / "python3"
    python.write_text("#!/bin/sh\ncase $2 in *ensurepip*) exit 1 ;; esac\n")
    python.chmod(0o755)
    done = run(clone / "run", "audit", PATH=str(bare_path))
    assert done.returncode == 3
    assert done.stderr == "kvdrift: python3 has no venv module (on Debian and Ubuntu: apt install python3-venv)\n"


def test_a_folder_that_run_did_not_make_is_left_alone(clone: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "lib").mkdir(parents=True)
    done = run(clone / "run", "audit", KVDRIFT_VENV=str(mine))
    assert done.returncode == 3
    assert done.stderr == (
        f"kvdrift: {mine} is there, and was not made by ./run; remove it, or name another folder with KVDRIFT_VENV\n"
    )
    assert [path.name for path in mine.iterdir()] == ["lib"]


def test_audit_starts_in_the_callers_folder_and_passes_its_arguments_on(clone: Path, finished: Path) -> None:
    elsewhere = clone / "else where"
    elsewhere.mkdir()
    done = run("../run", "audit", "a model", "--out", "x y", cwd=elsewhere, KVDRIFT_VENV=str(finished), PYTHONPATH="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        str(elsewhere), f"{clone}/src", "kvdrift", "audit", "a model", "--out", "x y"
    ]  # fmt: skip


@pytest.mark.parametrize(("verb", "module"), [("test", "pytest"), ("bench", "benchmarks")])
def test_test_and_bench_run_in_the_root_of_the_clone(clone: Path, finished: Path, verb: str, module: str) -> None:
    elsewhere = clone / "else where"
    elsewhere.mkdir()
    done = run(
        "../run", verb, "-k", "a b", "pyproject.toml", cwd=elsewhere, KVDRIFT_VENV=str(finished), PYTHONPATH="/theirs"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        str(clone),
        f"{clone}/src:/theirs",
        "python",
        "-m",
        module,
        "-k",
        "a b",
        "pyproject.toml",
    ]


def test_all_tests_run_in_a_process_a_core_and_named_ones_in_one(clone: Path, finished: Path) -> None:
    (clone / "tests").mkdir()
    asked: list[list[str]] = [[], ["-m", "not matrix"], ["tests"], ["-x", "tests::test_one"]]
    every, marked, one, single = (
        run(clone / "run", "test", *words, KVDRIFT_VENV=str(finished)).stdout.splitlines() for words in asked
    )
    assert "--numprocesses" in every
    assert "--numprocesses" in marked
    assert marked[-2:] == ["-m", "not matrix"]
    assert one[-3:] == ["-m", "pytest", "tests"]
    assert single[-4:] == ["-m", "pytest", "-x", "tests::test_one"]


def test_coverage_is_measured_where_it_is_asked_for(clone: Path, finished: Path) -> None:
    (clone / "tests").mkdir()
    (clone / ".coverage.of-an-earlier-run").touch()
    done = run(clone / "run", "test", "tests", KVDRIFT_VENV=str(finished), KVDRIFT_COVERAGE="1")
    assert done.stdout.splitlines()[-6:] == ["-m", "coverage", "run", "-m", "pytest", "tests"]
    assert not list(clone.glob(".coverage*"))


def test_a_relative_kvdrift_venv_is_seen_from_the_callers_folder(clone: Path, finished: Path) -> None:
    done = run("./run", "audit", cwd=clone, KVDRIFT_VENV=finished.name)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("change", ["constraints", "pyproject", "folder", "level", "no stamp", "no python"])
def test_an_environment_that_is_out_of_date_is_not_used(
    clone: Path, finished: Path, bare_path: Path, change: str
) -> None:
    """Without a Python on PATH, the attempt to install is what shows that the environment was refused."""
    stamp = finished / ".kvdrift-stamp"
    match change:
        case "constraints":
            append(clone / "constraints.txt", "six==1.17.0\n")
        case "pyproject":
            append(clone / "pyproject.toml", "# changed\n")
        case "folder":
            stamp.write_text(stamp.read_text().replace("my venv\n", "old venv\n"))
        case "level":
            stamp.write_text(stamp.read_text().replace("level dev\n", "level base\n"))
        case "no stamp":
            stamp.unlink()
        case "no python":
            (finished / "bin" / "python").unlink()
    done = run(clone / "run", "test", PATH=str(bare_path), KVDRIFT_VENV=str(finished))
    assert done.returncode == 3
    assert "Python 3.11 or newer is needed" in done.stderr


CI_SUMMARY = "==== 3 passed in 0.01s ===="


@pytest.mark.parametrize("broken", [None, "ruff", "mypy", "lint-imports", "python", "combine", "report"])
def test_continuous_integration_fails_if_any_part_fails_and_closes_with_the_summary(
    clone: Path, root: Path, tmp_path: Path, broken: str | None
) -> None:
    (clone / ".ci").mkdir()
    shutil.copy(root / ".ci" / "run", clone / ".ci" / "run")
    settings = b"".join((clone / name).read_bytes() for name in ("constraints.txt", "pyproject.toml"))
    venv = tmp_path / "kvdrift-ci" / hashlib.sha256(settings).hexdigest()[:16]
    says = {"python": CI_SUMMARY, "coverage": 'case $1 in report) echo 71 ;; esac; [ "$1" != "$BROKEN" ]'}
    for command in ("ruff", "mypy", "lint-imports", "python", "coverage", "chromium", "kvdrift-bench"):
        script = venv / "bin" / command
        script.parent.mkdir(parents=True, exist_ok=True)
        what = says.get(command, "")
        body = what if command == "coverage" else f"echo '{what}'"
        script.write_text(f'#!/bin/sh\n{body} || exit 2\n[ "${{0##*/}}" != "$BROKEN" ]\n')
        script.chmod(0o755)
    (venv / ".kvdrift-stamp").write_bytes(b"level dev\nvenv %b\n%b" % (bytes(venv), settings))

    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    done = run(clone / ".ci" / "run", XDG_CACHE_HOME=str(tmp_path), PATH=path, BROKEN=str(broken))

    assert (done.returncode == 0) == (broken is None), done.stdout + done.stderr
    if broken is None:
        assert done.stdout.splitlines()[-2:] == ["the quick tests reach 71 % of kvdrift", CI_SUMMARY]
    if broken == "report":
        assert "less than the floor" in done.stdout


def test_only_quick_tests_are_traced_where_that_is_asked_for(root: Path, tmp_path: Path) -> None:
    """Of three functions, a quick test calls one, a slow test another, and a test of another folder the third."""
    names = ("quick", "slow", "other")
    (tmp_path / "traced.py").write_text("".join(f"def {name}():\n    return 1\n\n\n" for name in names))
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["slow", "matrix"]\n')
    for folder in ("unit", "engines"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
    shutil.copy(root / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "unit" / "test_a.py").write_text(
        "import pytest, traced\n\n\ndef test_quick():\n    traced.quick()\n\n\n"
        "@pytest.mark.slow\ndef test_slow():\n    traced.slow()\n"
    )
    (tmp_path / "tests" / "engines" / "test_b.py").write_text(
        "import traced\n\n\ndef test_other():\n    traced.other()\n"
    )

    missing = {}
    for traced in ("quick", "1"):
        command = [sys.executable, "-m", "coverage", "run", "--include", "traced.py", "-m", "pytest"]
        settings = {"KVDRIFT_COVERAGE": traced, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = run(*command, cwd=tmp_path, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        report = run(sys.executable, "-m", "coverage", "report", "--show-missing", cwd=tmp_path).stdout
        (line,) = (line for line in report.splitlines() if line.startswith("traced.py"))
        missing[traced] = line.split("%")[1].strip()

    assert missing == {"quick": "6, 10", "1": ""}


def wheel_of_llama_cpp(folder: Path, version: str, spoil: bool) -> None:
    """Write a wheel with the libraries that are installed here; spoilt, none of them can be loaded."""
    import llama_cpp

    folder.mkdir()
    name = f"llama_cpp_python-{version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        for library in (Path(str(llama_cpp.__file__)).parent / "lib").iterdir():
            wheel.writestr(f"llama_cpp/lib/{library.name}", b"" if spoil else library.read_bytes())
        wheel.writestr(
            f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n"
        )
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


@pytest.mark.parametrize(
    ("there", "spoil", "is_taken"), [("1.2.3", False, True), ("1.2.3", True, False), ("1.2.4", False, False)]
)
def test_a_prebuilt_wheel_is_taken_where_its_library_starts(
    root: Path, tmp_path: Path, there: str, spoil: bool, is_taken: bool
) -> None:
    """The function of ./run by itself, on a folder of wheels in place of the index."""
    wheel_of_llama_cpp(tmp_path / "wheels", there, spoil)
    text = (root / "run").read_text(encoding="utf-8")
    function = text[text.index("prebuilt() {") : text.index("\n}\n", text.index("prebuilt() {")) + 3]
    (tmp_path / "taken").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    script = f"set -eu\nroot={tmp_path}\nvenv={tmp_path}/venv\n{function}prebuilt {tmp_path}/taken 1.2.3"
    done = run("sh", "-c", script, KVDRIFT_LLAMA_WHEELS=str(tmp_path / "wheels"))
    assert (done.returncode == 0) == is_taken, done.stderr
    assert len(list((tmp_path / "taken").glob("*.whl"))) == is_taken
