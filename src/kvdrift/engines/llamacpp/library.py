"""llama-cpp-python found and kept quiet; a model opened, asked about itself, and written again with other weights."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from kvdrift.engines.llamacpp.ggml import Ggml
from kvdrift.errors import EngineUnavailable, UsageError

INSTALL_HINT = "pip install 'kvdrift[llamacpp]'"
_MAGIC = b"GGUF"
_ERROR, _CONTINUE = 4, 5  # ggml.h: enum ggml_log_level
_KEPT_LINES = 20

_NO_VOCABULARY = 0  # llama.h: LLAMA_VOCAB_TYPE_NONE


@dataclass(slots=True)
class Library:
    """The binding `api`, the tensors' library `ggml`, and what llama.cpp complained of lately."""

    api: Any
    ggml: Ggml
    version: str
    _lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    _callback: Any = None
    _level: int = 0

    def quieten(self) -> None:
        """Keep what llama.cpp logs from stderr; `complaint` has its errors."""

        def log(level: int, text: bytes, _user: object) -> None:
            self._level = self._level if level == _CONTINUE else level
            line = text.decode(errors="replace").strip()
            if line and self._level == _ERROR:
                self._lines.append(line)

        self._callback = self.api.llama_log_callback(log)  # kept, or it would be collected while C still calls it
        self.api.llama_log_set(self._callback, ctypes.c_void_p(0))

    def complaint(self) -> str:
        """Return the first error that llama.cpp logged since the last call: what follows it are its consequences."""
        first = self._lines[0] if self._lines else "llama.cpp gave no reason"
        self._lines.clear()
        return first


_loaded: list[Library] = []


def load_library() -> Library:
    """Import llama-cpp-python once.

    Raises:
        EngineUnavailable: it is not installed, or does not start on this machine.
    """
    if _loaded:
        return _loaded[0]
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise EngineUnavailable(
            f"auditing llama.cpp needs {error.name!r}; {INSTALL_HINT} (it compiles llama.cpp, which takes minutes "
            "and needs a C++ compiler)"
        ) from error
    except (OSError, RuntimeError, FileNotFoundError) as error:
        raise EngineUnavailable(f"llama-cpp-python does not start: {error}; reinstall it: {INSTALL_HINT}") from error
    api = llama_cpp.llama_cpp
    library = Library(api, Ggml.beside(str(llama_cpp.__file__)), str(llama_cpp.__version__))
    library.quieten()
    api.llama_backend_init()
    _loaded.append(library)
    return library


def kv_types(api: ModuleType) -> dict[str, int]:
    """Return the cache types that llama.cpp offers, by name."""
    names = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
    numbers = {"bf16": 30}  # missing among the constants of the binding
    return {name: numbers.get(name, getattr(api, f"GGML_TYPE_{name.upper()}", -1)) for name in names}


def check_gguf(path: Path) -> None:
    """Refuse what is not a GGUF file.

    Raises:
        EngineUnavailable: there is no such file, or it cannot be read.
        UsageError: it is something else.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a .gguf file: kvdrift audit llamacpp:FILE.gguf")
    try:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC))
    except OSError as error:
        raise EngineUnavailable(f"there is no readable model at {path}: {error.strerror or error}") from error
    if head != _MAGIC:
        raise UsageError(f"{path} is not a GGUF file (it begins with {head!r} instead of {_MAGIC!r})")


class Model:
    """An open GGUF file; `close` frees it, and its contexts must be closed before."""

    def __init__(self, library: Library, path: Path) -> None:
        api = library.api
        parameters = api.llama_model_default_params()
        # Layers on the CPU: a device would run kernels of its own for some of the two routes' shapes.
        parameters.n_gpu_layers = 0
        library.complaint()
        self._api = api
        self.pointer = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise EngineUnavailable(f"llama.cpp cannot load {path}: {library.complaint()}")
        self.vocab = api.llama_model_get_vocab(self.pointer)

    def close(self) -> None:
        """Free the weights."""
        if self.pointer:
            self._api.llama_model_free(self.pointer)
            self.pointer = None

    def meta(self, key: str) -> str | None:
        """Return a metadata value of the file, None if it has none under this key."""
        buffer = ctypes.create_string_buffer(256)
        length = self._api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode(errors="replace")

    @property
    def weight_type(self) -> str:
        """The type of most weights as the file names it, such as q4_1."""
        number = self.meta("general.file_type")
        for name in dir(self._api):
            if name.startswith("LLAMA_FTYPE_") and str(getattr(self._api, name)) == number:
                return name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_").lower()
        return "unknown"

    @property
    def n_layers(self) -> int:
        return int(self._api.llama_model_n_layer(self.pointer))

    @property
    def n_vocab(self) -> int:
        return int(self._api.llama_vocab_n_tokens(self.vocab))

    @property
    def n_positions(self) -> int:
        return int(self._api.llama_model_n_ctx_train(self.pointer))

    @property
    def n_parameters(self) -> int:
        return int(self._api.llama_model_n_params(self.pointer))

    @property
    def key_width(self) -> int | None:
        """Elements of a key of one head, None if the file does not say."""
        stated = self.meta(f"{self.meta('general.architecture')}.attention.key_length")
        n_heads = int(self._api.llama_model_n_head(self.pointer))
        return (
            int(stated) if stated else int(self._api.llama_model_n_embd(self.pointer)) // n_heads if n_heads else None
        )

    @property
    def window(self) -> int | None:
        """The sliding window of the layers that have one, None if all of them see every token."""
        return int(self._api.llama_model_n_swa(self.pointer)) or None

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state instead of keys and values."""
        return bool(self._api.llama_model_is_recurrent(self.pointer) or self._api.llama_model_is_hybrid(self.pointer))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file brings a vocabulary; llama.cpp ends the process if it must tokenize without one."""
        return int(self._api.llama_vocab_type(self.vocab)) != _NO_VOCABULARY

    @property
    def is_decoder(self) -> bool:
        """Whether it is a decoder alone."""
        has = self._api.llama_model_has_decoder(self.pointer)
        return bool(has) and not self._api.llama_model_has_encoder(self.pointer)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text as llama.cpp itself tokenizes it, special first token included."""
        raw = text.encode()
        room = len(raw) + 8
        while True:
            tokens = (self._api.llama_token * room)()
            found = self._api.llama_tokenize(self.vocab, raw, len(raw), tokens, room, True, False)
            if found >= 0:
                return list(tokens[:found])
            room = -found


def weight_ftype(api: ModuleType, name: str) -> int:
    """Return llama.cpp's number of a file whose weight matrices are of type `name`, such as f16 or q4_0.

    Raises:
        UsageError: llama.cpp has no such type.
    """
    prefixes = ("LLAMA_FTYPE_ALL_", "LLAMA_FTYPE_MOSTLY_")
    known = {
        item.removeprefix(prefix).lower(): int(getattr(api, item))
        for item in dir(api)
        for prefix in prefixes
        if item.startswith(prefix)
    }
    if name not in known:
        raise UsageError(f"unknown type of weights {name!r}; llama.cpp has {', '.join(sorted(known))}")
    return known[name]


def requantise(library: Library, source: Path, target: Path, weights: str, threads: int) -> None:
    """Write `source` again with all weight matrices of type `weights`, by llama.cpp's own quantiser.

    `target` is there when it is whole, and not before: several processes may write it at once.

    Raises:
        UsageError: llama.cpp has no such type.
        EngineUnavailable: there is no room, or llama.cpp cannot convert this file.
    """
    api = library.api
    partial = target.with_suffix(f".{os.getpid()}.partial")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = weight_ftype(api, weights)
    parameters.allow_requantize = True
    parameters.pure = True
    parameters.nthread = threads
    library.complaint()
    try:
        failed = api.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters))
    except OSError as error:
        raise EngineUnavailable(f"cannot write {source.name} with {weights} weights: {error}") from error
    if failed or not partial.is_file():
        free = shutil.disk_usage(target.parent).free
        raise EngineUnavailable(
            f"llama.cpp cannot write {source.name} with {weights} weights to {target.parent} ({free / 2**30:.1f} GiB "
            f"free): {library.complaint()}"
        )
    partial.rename(target)
