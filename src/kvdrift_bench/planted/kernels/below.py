"""Compiles the kernels of below.cpp once, and calls them with tensors where no torch function mode looks."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdrift.engines.hf.demo import cache_root
from kvdrift.errors import EngineUnavailable

# The numbers of `enum Defect` in below.cpp.
DEFECTS = {
    "": 0,
    "tail_skipped": 1,
    "peak_stale": 2,
    "split_dropped": 3,
    "wrong_base": 4,
    "one_head_row": 5,
    "scale": 6,
    "one_output": 7,
    "page_stale": 8,
    "group_shifted": 9,
    "tile_weight": 10,
    "epsilon": 11,
    "one_element": 12,
}
_FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC")
_TIMEOUT_S = 300.0
_DTYPES = {torch.float32, torch.int8, torch.int32, torch.bfloat16}


class Shape(ctypes.Structure):
    """`struct Shape` of below.cpp: numbers of heads, kv heads, query rows, keys, dims of a key and of a value."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "rows", "keys", "dim", "values")),
        ("scale", ctypes.c_float),
    )


def compiler() -> str | None:
    """Return the C++ compiler: CXX of the environment, or g++, c++ or clang++; None if there is none."""
    wanted = os.environ.get("CXX", "")
    return next((path for name in (wanted, "g++", "c++", "clang++") if name and (path := shutil.which(name))), None)


def needs_compiler(model: object) -> str | None:
    """A C++ compiler."""
    return None if compiler() else "no C++ compiler; install g++ or name one in CXX"


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels. They are built once for each text of the source and kept in kvdrift's cache folder.

    Any number of processes may call this at once: each builds a file of its own and gives it the final name.

    Raises:
        EngineUnavailable: there is no compiler, it failed, or the folder cannot be written.
    """
    source = (files("kvdrift_bench.planted.kernels") / "below.cpp").read_text(encoding="utf-8")
    found = compiler()
    if found is None:
        raise EngineUnavailable("the kernels of the benchmark need a C++ compiler; install g++ or name one in CXX")
    key = hashlib.sha256("\n".join((source, found, *_FLAGS)).encode()).hexdigest()[:16]
    target = cache_root() / "kernels" / f"below-{key}.so"
    if not target.exists():
        _build(found, source, target)
    return ctypes.CDLL(str(target))


def _build(compiler_path: str, source: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            text, built = Path(folder) / "below.cpp", Path(folder) / "below.so"
            text.write_text(source, encoding="utf-8")
            command = [compiler_path, *_FLAGS, str(text), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
            os.replace(built, target)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise EngineUnavailable(f"kernels of the benchmark cannot be compiled with {compiler_path}: {said}") from error
    except OSError as error:
        raise EngineUnavailable(
            f"cannot keep kernels in {target.parent}: {error.strerror}; set XDG_CACHE_HOME to a writable folder"
        ) from error


@contextmanager
def unseen() -> Iterator[None]:
    """Run torch calls where no torch function mode sees them, as those of a compiled extension are not seen."""
    with torch._C.DisableTorchFunction():
        yield


def dense(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a dense copy of a tensor in the dtype that a kernel computes in, whatever the dtype of the model is."""
    return tensor.detach().to("cpu", dtype).contiguous()


def run(name: str, *arguments: Any, defect: str = "") -> None:
    """Call a kernel with dense tensors, None, a `Shape`, ints, bools and floats; the defect comes last.

    Raises:
        TypeError: a tensor is not dense, or of a dtype that no kernel takes.
    """
    getattr(library(), name)(*(_argument(each) for each in arguments), ctypes.c_int(DEFECTS[defect]))


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        if value.dtype not in _DTYPES or not value.is_contiguous():
            raise TypeError(f"a kernel was handed a tensor of {value.dtype} and strides {value.stride()}")
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, Shape):
        return ctypes.byref(value)
    if isinstance(value, bool):
        return ctypes.c_int(value)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


__all__ = ["DEFECTS", "Shape", "compiler", "dense", "library", "needs_compiler", "run", "unseen"]
