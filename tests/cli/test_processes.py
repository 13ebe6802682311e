"""The command as a process: signals, pipes and terminals."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvdrift as library
from tests.support.command import MAIN, ROOT, SMALL, kvdrift, names, process
from tests.support.matrix import further
from tests.support.tiny import tiny_model

SLOW = """
import time
from tests.support.command import SMALL
from tests.support.tiny import tiny_model

def load():
    model = tiny_model("llama", **SMALL)
    calls = 0
    def hook(module, args, kwargs):
        nonlocal calls
        calls += 1
        if calls == 8:
            open("reached", "w").close()
            time.sleep(SECONDS)
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    return model, None
"""

# The same of numpy: where nothing depends on the model, a process need not import torch, which takes longer than a run.
# Before its directory is there, an engine of this kind is called eleven times.
SLOW_OF_NUMPY = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "examples" / "engines")!r})
from numpy_engine import Decoder, NumpyEngine

class Slow(NumpyEngine):
    calls = 0
    def extend(self, tokens, cache, start):
        self.calls += 1
        if self.calls == 20:
            open("reached", "w").close()
            time.sleep(SECONDS)
        return super().extend(tokens, cache, start)

def load():
    return Slow(Decoder())
"""


def slow(here: Path, seconds: float, program: str = SLOW_OF_NUMPY) -> None:
    (here / "mine.py").write_text(program.replace("SECONDS", str(seconds)))


def until_reached(here: Path, run: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 300
    while not (here / "reached").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def left(here: Path) -> set[str]:
    return names(here) - {"mine.py", "reached", "__pycache__"}


def test_an_interrupted_run_leaves_nothing(here: Path, prompts: Path) -> None:
    slow(here, 60, SLOW)
    run = process("audit", "mine:load", "--prompts", prompts, "--span", "1", "--out", "a/run", cwd=here)
    until_reached(here, run)
    assert left(here / "a") != set()

    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=300)

    assert (run.returncode, out, err) == (130, "", "kvdrift: interrupted; nothing was written\n")
    assert left(here) == set()


def test_a_killed_run_leaves_no_report_and_the_next_one_cleans_up(here: Path, prompts: Path, llama: Path) -> None:
    slow(here, 60)
    run = process("audit", "mine:load", "--prompts", prompts, "--span", "1", "--out", "run", cwd=here)
    until_reached(here, run)
    (part,) = left(here)
    assert re.fullmatch(r"\.run\..*\.part", part)

    assert kvdrift("audit", llama, "--prompts", prompts, "--span", "1", "--out", "run").code == 0
    assert left(here) == {"run", part}  # it was alive

    run.kill()
    run.communicate(timeout=300)
    assert left(here) == {"run", part}
    assert kvdrift("audit", llama, "--prompts", prompts, "--span", "1", "--out", "run").code == 0
    assert left(here) == {"run"}


def test_a_disk_that_is_full_before_the_run_is_written(
    here: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of a file stands for the disk: the drift table, the traces, none of them fits."""
    slow(here, 0)
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # its data would not fit either, and it says so
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); " + MAIN
    before = left(here)
    run = process("audit", "mine:load", "--prompts", prompts, "--span", "1", "--out", "run", cwd=here, program=limited)
    _, err = run.communicate(timeout=300)

    assert run.returncode == 2
    assert re.search(r"kvdrift: cannot write to --out \S*run: File too large; name a directory .*\n$", err)
    assert left(here) == before


@pytest.mark.parametrize("word", ["show", *further("judge")])
def test_a_reader_that_has_gone(here: Path, word: str) -> None:
    """As in `kvdrift show run | head`: no complaint, and the exit code stays that of the result."""
    library.audit(tiny_model("llama", **SMALL), prompts={"p": [1, 2, 3]}, span=1, out=here / "run")
    read, write = os.pipe()
    os.close(read)

    run = process(word, "run", cwd=here, stdout=write)
    os.close(write)
    _, err = run.communicate(timeout=300)

    assert (run.returncode, err) == (0, "")


def finished(here: Path, report: str) -> None:
    """Make a run directory with this report and a verdict."""
    (here / "run").mkdir()
    (here / "run" / "report.md").write_text(report, encoding="utf-8")
    (here / "run" / "report.json").write_text('{"schema_version": 1, "verdict": "EXACT"}')


def test_a_terminal_that_lacks_characters(here: Path) -> None:
    finished(here, "H₀\n")

    run = process("show", "--markdown", "run", cwd=here, env={"PYTHONIOENCODING": "latin-1"})

    assert run.communicate(timeout=300) == ("H?\n", "")


def test_a_bug_of_ours_keeps_its_traceback(here: Path) -> None:
    broken = "import kvdrift.report.run_directory\ndel kvdrift.report.run_directory.default_target\n" + MAIN

    run = process("audit", here, cwd=here, program=broken)

    assert "Traceback (most recent call last)" in run.communicate(timeout=300)[1]
    assert run.returncode == 1


def with_terminal(here: Path, *arguments: str | Path, **options: str) -> tuple[str, str, int]:
    """Run with a terminal as stderr; return stdout, what the terminal got, and the code."""
    ours, theirs = pty.openpty()
    run = process(*arguments, cwd=here, stderr=theirs, env={"TERM": "xterm", **options})
    os.close(theirs)
    drawn = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        drawn += data
    os.close(ours)
    out, _ = run.communicate(timeout=300)
    return out, drawn.decode(), run.returncode


def test_bars_are_drawn_on_a_terminal(here: Path, prompts: Path) -> None:
    slow(here, 1.5)

    out, drawn, code = with_terminal(here, "audit", "mine:load", "--prompts", prompts, "--span", "1", "--out", "run")

    assert code == 0
    assert re.search(r"p: .* at (bfloat16|float32|float64)", drawn)
    assert re.search(r"\d+/\d+", drawn)
    assert "report: " in out
    assert "\x1b" not in out


def test_nothing_is_drawn_elsewhere(here: Path, prompts: Path) -> None:
    """Not even where a CI system asks for colours, or by what torch and transformers import."""
    slow(here, 1.5, SLOW)

    run = process(
        "audit",
        "mine:load",
        "--prompts",
        prompts,
        "--span",
        "1",
        "--out",
        "run",
        cwd=here,
        env={"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "TTY_COMPATIBLE": "1"},
    )
    out, err = run.communicate(timeout=300)

    assert (run.returncode, err) == (0, "")
    assert "report: " in out


def test_nothing_is_drawn_for_what_takes_no_second(here: Path) -> None:
    finished(here, "all\n")

    assert with_terminal(here, "show", "--markdown", "run") == ("all\n", "", 0)


@pytest.mark.parametrize("arguments", [["--version"], ["audit", "--help"]])
def test_answers_that_need_no_torch_import_none(arguments: list[str]) -> None:
    program = f"import sys; sys.argv[1:] = {arguments!r}\n" + (
        "import atexit; atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n" + MAIN
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stderr == "False"
