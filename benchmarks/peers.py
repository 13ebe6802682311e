"""Other tools on the same work: comparators on the tensors of an audit, nnsight on its passes.

They are no requirements of kvdrift. Each is installed, at the version named here, into a folder of kvdrift's cache
folder, without what it would bring along of torch, and runs in a process of its own. Of SGLang only the comparator is
there, whose three imports from the rest of SGLang are replaced by names that it never calls.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import judging
from benchmarks.support import demo, say
from benchmarks.table import Row
from kvdrift.engines.hf.demo import cache_root
from kvdrift.engines.torch.arrays import to_tensor
from kvdrift.errors import EngineUnavailable
from kvdrift.pairing.align import Aligner
from kvdrift.trace.model import Array
from kvdrift.trace.readers.own import open_own
from kvdrift.vocabulary.plan import PairRole

SGLANG = "sglang==0.5.23"
PACKAGES = (
    "nnsight==0.8.1",
    "polygraphy==0.53.6",
    "mindstudio-probe==26.2.0",
    *("polars==2.1.0", "polars-runtime-32==2.1.0", "pyzmq==27.3.0"),  # of SGLang's comparator
    *("cloudpickle==3.1.3", "greenlet==3.5.6", "websocket-client==1.9.2", "zstandard==0.25.0"),  # of nnsight
    *("absl-py==2.5.1", "einops==0.8.2", "et-xmlfile==2.0.0", "openpyxl==3.1.5", "pandas==3.1.1"),  # of msprobe
    *("protobuf==7.36.2", "python-dateutil==4.0.0", "pytz==2026.6", "six==1.17.0", "tensorboard==2.21.0"),
    *("contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0", "kiwisolver==1.5.1", "matplotlib==3.11.2"),
    *("pillow==13.0.0", "pyparsing==3.3.3"),
)
_SHIMS = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/managers/__init__.py": "",
    "sglang/srt/managers/io_struct.py": "sock_recv = sock_send = wrap_as_pickle = None\n",
    "sglang/srt/runtime_context.py": "get_parallel = get_server_args = get_serving = None\n",
    "sglang/srt/utils.py": "get_device = None\n",
}

TIMES = 10.0
CAPTURE_TIMES = 3.0
_NAMES = ("SGLang's comparator", "msprobe", "Polygraphy")
JUDGE_ROWS = tuple(
    Row("judge, traces of the default audit", f"times as fast as {name}, by size", TIMES, at_least=True)
    for name in _NAMES
)
CAPTURE_ROW = Row("capture alone, the same", "times as fast as nnsight", CAPTURE_TIMES, at_least=True)

# What each process imports, and what it does then with two folders of tensors and one for its results.
_SGLANG = (
    "import sglang.srt.debug_utils.comparator.entrypoint as tool",
    "sys.exit(tool.run(tool.parse_args(['--baseline-path', first, '--target-path', second, '--preset', 'raw', "
    "'--report-path', out + '/r.jsonl', '--allow-skipped-pattern', '^$'])))",
)
_MSPROBE = (
    "from msprobe.pytorch.compare.pt_compare import pt_compare",
    "pt_compare({'npu_path': second + '/dump.json', 'bench_path': first + '/dump.json', "
    "'is_print_compare_log': False}, out)",
)
_POLYGRAPHY = (
    "from polygraphy.comparator import Comparator, CompareFunc, RunResults",
    "found = RunResults.load(first + '/p.json'); found.extend(RunResults.load(second + '/p.json')); "
    "Comparator.compare_accuracy(found, compare_func=CompareFunc.simple(check_error_stat='max')); "
    "open(out + '/done', 'w').close()",
)


class _Pair(NamedTuple):
    name: str
    prefill: Array
    decode: Array


def judged(repeats: int) -> list[Row]:
    """How many times as long each comparator takes for a GB of the tensors that an audit recorded as kvdrift for one of
    its traces, with all its instruments."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        ours = judging.seconds_a_gb(run, repeats)
        pairs = list(_pairs(run))
        rows = []
        for row, name in zip(JUDGE_ROWS, _NAMES, strict=True):
            where = Path(folder) / name.split("'")[0]
            found = _seconds_a_gb(name, where, pairs, repeats)
            values = [theirs / mine for theirs, mine in zip(found, ours, strict=True)]
            median = sorted(found)[len(found) // 2]
            note = f"{median:.3g} s/GB on {len(pairs)} pairs of tensors of the native passes of one prompt"
            rows.append(Row(row.what, row.measure, row.limit, values, at_least=True, note=note))
        return rows


def _pairs(run: Path) -> Iterator[_Pair]:
    """The tensors of the native pairs of the first prompt: of each site and layer all positions together."""
    recording = open_own(run)
    native, prompt = recording.facts.dtype, recording.prompts[0].name
    for item in recording.pairs():
        pair = item.pair
        if item.role is PairRole.PAIR and (pair.prefill.rung, pair.prefill.prompt) == (native, prompt):
            for values in Aligner(pair).pairs():
                name = f"{pair.mode}.{values.layer}.{values.site}.{values.positions[0]}"
                yield _Pair(name, np.array(values.prefill), np.array(values.decode))
        elif pair.prefill.prompt != prompt:
            return


def _seconds_a_gb(name: str, folder: Path, pairs: list[_Pair], repeats: int) -> list[float]:
    """Processor seconds of a comparator for each GB, above what its imports take."""
    write, code = {
        "SGLang's comparator": (_write_sglang, _SGLANG),
        "msprobe": (_write_msprobe, _MSPROBE),
        "Polygraphy": (_write_polygraphy, _POLYGRAPHY),
    }[name]
    n_bytes = 0
    for side in ("prefill", "decode"):
        here = folder / side
        here.mkdir(parents=True)
        n_bytes += write(here, [(pair.name, getattr(pair, side)) for pair in pairs])
    out = folder / "out"
    out.mkdir()
    paths = [str(folder / "prefill"), str(folder / "decode"), str(out)]
    given = f"import sys; first, second, out = {paths!r}; "
    plain = min(_process(given + code[0]) for _ in range(2))
    found = [_process(given + "; ".join(code)) - plain for _ in range(repeats)]
    if not any(out.iterdir()):
        raise EngineUnavailable(f"{name} left no result; its version is that of {PACKAGES} or {SGLANG}")
    say(f"{name}: {min(found):.1f} s above the {plain:.1f} s of its imports for {n_bytes / 1e6:.0f} MB")
    return [seconds / n_bytes * 1e9 for seconds in found]


def _process(code: str) -> float:
    folder = installed()
    path = os.pathsep.join([str(folder), *(p for p in sys.path if p)])
    return judging.python_of({"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}, "-c", code).processor


def _write_sglang(folder: Path, tensors: list[tuple[str, Array]]) -> int:
    for index, (name, values) in enumerate(tensors):
        tags = f"step=0___rank=0___dump_index={index}___name={name}"
        torch.save({"value": to_tensor(values, torch.device("cpu")), "meta": {}}, folder / f"{tags}.pt")
    return sum(values.nbytes for _, values in tensors)


def _write_msprobe(folder: Path, tensors: list[tuple[str, Array]]) -> int:
    data: dict[str, Any] = {}
    where = folder / "dump_tensor_data"
    where.mkdir()
    for name, values in tensors:
        tensor = to_tensor(values, torch.device("cpu"))
        api = f"Module.{name.replace('.', '_')}.Linear.forward.0"
        file = f"{api}.output.0.pt"
        torch.save(tensor, where / file)
        wide = tensor.float()
        finite = wide[torch.isfinite(wide)]
        data[api] = {
            "input_args": [],
            "input_kwargs": {},
            "output": [
                {
                    "type": "torch.Tensor",
                    "dtype": str(tensor.dtype),
                    "shape": list(tensor.shape),
                    "Max": float(finite.max()),
                    "Min": float(finite.min()),
                    "Mean": float(finite.mean()),
                    "Norm": float(finite.norm()),
                    "requires_grad": False,
                    "data_name": file,
                }
            ],
        }
    whole = {"task": "tensor", "level": "L0", "framework": "pytorch", "dump_data_dir": str(where), "data": data}
    (folder / "dump.json").write_text(json.dumps(whole), encoding="utf-8")
    for name in ("stack.json", "construct.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return sum(values.nbytes for _, values in tensors)


def _write_polygraphy(folder: Path, tensors: list[tuple[str, Array]]) -> int:
    """Polygraphy's arrays are numpy's, which has no bfloat16: they are written in float32, and counted so."""
    arrays = {name: values.astype(np.float32) for name, values in tensors}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "a.npz"
        np.savez(source, **arrays)  # type: ignore[arg-type]
        code = (
            "import sys, numpy as np; from polygraphy.comparator import IterationResult, RunResults; "
            f"data = dict(np.load({str(source)!r})); found = RunResults(); "
            f"found.append(({folder.name!r}, [IterationResult(outputs=data, runner_name={folder.name!r})])); "
            f"found.save({str(folder / 'p.json')!r})"
        )
        _process(code)
    return sum(values.nbytes for values in arrays.values())


def captured(repeats: int) -> tuple[list[float], list[float]]:
    """Return the processor times of capture by kvdrift and by nnsight, in turn, in a process that has nnsight."""
    path = os.pathsep.join([str(installed()), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", str(repeats)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["kvdrift"], found["nnsight"]


def _capture_both(repeats: int) -> dict[str, list[float]]:
    from benchmarks.passes import capture, save_by_nnsight, texts_of
    from benchmarks.table import timed
    from kvdrift.engines.hf.engine import HFEngine

    loaded = demo()
    texts = texts_of(loaded)
    wrapped = importlib.import_module("nnsight").NNsight(loaded.model)
    found: dict[str, list[float]] = {"kvdrift": [], "nnsight": []}
    for index in range(repeats + 1):
        with HFEngine(loaded.model) as engine:
            ours = timed(lambda engine=engine: capture(engine, texts))  # type: ignore[misc]
        theirs = save_by_nnsight(wrapped, texts)
        if index:
            found["kvdrift"].append(ours)
            found["nnsight"].append(theirs)
    return found


def capture_rows(repeats: int) -> list[Row]:
    """How many times as fast capture is as that of nnsight."""
    ours, theirs = captured(repeats)
    values = [b / a for a, b in zip(ours, theirs, strict=True)]
    note = "nnsight keeps what modules give, no scores and no cache, and writes nothing"
    return [Row(CAPTURE_ROW.what, CAPTURE_ROW.measure, CAPTURE_ROW.limit, values, at_least=True, note=note)]


def installed() -> Path:
    """Return the folder that holds the other tools; install them if they are not there."""
    folder = cache_root() / "peers"
    stamp, wanted = folder / ".complete", "\n".join([SGLANG, *PACKAGES])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return folder
    say("installing the tools that kvdrift is measured against into the cache folder")
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as scratch:
        for command in (
            [*pip, "install", "--no-deps", "--upgrade", "--target", str(folder), *PACKAGES],
            [*pip, "download", "--no-deps", "--dest", scratch, SGLANG],
        ):
            if subprocess.run(command, check=False).returncode:
                raise EngineUnavailable("pip could not install the tools for the benchmark (see above)")
        with zipfile.ZipFile(next(Path(scratch).glob("sglang*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("sglang/srt/debug_utils/")]
            wheel.extractall(folder, names)
    for name, text in _SHIMS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    stamp.write_text(wanted, encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_capture_both(int(sys.argv[1]))) + "\n")
