"""The state of a context saved and read back into another one, by each way that llama.cpp has for it."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from kvdrift.engines.llamacpp.sequence import Context, LlamaSequence
from kvdrift.errors import CaptureError

# From two contexts, the sequences that are moved, and what is done to the bytes on the way, to whether it worked.
_Change = Callable[[bytes], bytes]
_Way = Callable[[Context, Context, Sequence[int], _Change], bool]


def _whole(source: Context, target: Context, sequences: Sequence[int], change: _Change) -> bool:
    api, size = source.api, source.api.llama_state_get_size(source.pointer)
    buffer = (ctypes.c_uint8 * size)()
    n_bytes = api.llama_state_get_data(source.pointer, buffer, size)
    data = change(bytes(buffer)[:n_bytes])
    return bool(n_bytes) and bool(api.llama_state_set_data(target.pointer, _bytes(data), len(data)))


def _one_by_one(source: Context, target: Context, sequences: Sequence[int], change: _Change) -> bool:
    api = source.api
    for sequence in sequences:
        size = api.llama_state_seq_get_size(source.pointer, sequence)
        buffer = (ctypes.c_uint8 * size)()
        n_bytes = api.llama_state_seq_get_data(source.pointer, buffer, size, sequence)
        data = change(bytes(buffer)[:n_bytes])
        if not n_bytes or not api.llama_state_seq_set_data(target.pointer, _bytes(data), len(data), sequence):
            return False
    return True


def _file(source: Context, target: Context, sequences: Sequence[int], change: _Change) -> bool:
    api, no_tokens, n_read = source.api, (source.api.llama_token * 1)(), ctypes.c_size_t(0)
    with tempfile.TemporaryDirectory(prefix="kvdrift-state-") as folder:
        path = Path(folder) / "state"
        if not api.llama_state_save_file(source.pointer, str(path).encode(), no_tokens, 0):
            return False
        path.write_bytes(change(path.read_bytes()))
        return bool(api.llama_state_load_file(target.pointer, str(path).encode(), no_tokens, 1, ctypes.byref(n_read)))


def _file_each(source: Context, target: Context, sequences: Sequence[int], change: _Change) -> bool:
    api, no_tokens, n_read = source.api, (source.api.llama_token * 1)(), ctypes.c_size_t(0)
    with tempfile.TemporaryDirectory(prefix="kvdrift-state-") as folder:
        path = Path(folder) / "state"
        name = str(path).encode()
        for sequence in sequences:
            if not api.llama_state_seq_save_file(source.pointer, name, sequence, no_tokens, 0):
                return False
            path.write_bytes(change(path.read_bytes()))
            if not api.llama_state_seq_load_file(target.pointer, name, sequence, no_tokens, 1, ctypes.byref(n_read)):
                return False
    return True


def _bytes(data: bytes) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * len(data)).from_buffer_copy(data)


EXPORTS: dict[str, _Way] = {
    "state": _whole,
    "state of one sequence": _one_by_one,
    "file": _file,
    "file of one sequence": _file_each,
}


_OF_ONE = ("state of one sequence", "file of one sequence")


def move_state(way: str, before: Sequence[LlamaSequence], after: Sequence[LlamaSequence]) -> None:
    """Save the state of the context of some sequences, read it into an empty context, and close the first one.

    Raises:
        CaptureError: llama.cpp could not save it or read it back.
    """
    source, target = before[0].context, after[0].context
    numbers = [sequence.number for sequence in before]
    source.complain_anew()
    if not EXPORTS[way](source, target, numbers, source.changes_of_state):
        raise CaptureError(f"llama.cpp did not move its {way} to another context: {source.complaint()}")
    target.recorder.cells.load(source.recorder.cells, numbers, visible_only=way in _OF_ONE)
    for old, new in zip(before, after, strict=True):
        new.advance(old.length)
        old.close()
