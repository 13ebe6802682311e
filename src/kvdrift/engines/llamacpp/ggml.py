"""Tensors of ggml as numpy arrays, read and written from outside of the library.

A graph callback hands over the address of a `ggml_tensor`. Its struct is read by ctypes; bytes go through ggml's own
functions, so that a tensor on a device is copied and one in host memory is viewed in place. Block formats are
unpacked by ggml's own `to_float`. Knows tensors; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import EngineUnavailable
from kvdrift.trace.model import Array

Bytes = NDArray[np.uint8]

# ggml.h: enum ggml_type. Every other type is a block format.
_PLAIN: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    24: np.dtype(np.int8),
    25: np.dtype(np.int16),
    26: np.dtype(np.int32),
    27: np.dtype(np.int64),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}


_FLOAT32 = 0


class TensorStruct(ctypes.Structure):
    """ggml.h: struct ggml_tensor. `Ggml.check` compares it with what the library itself says of a tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
    )


class _TypeTraits(ctypes.Structure):
    """ggml.h: the head of struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@dataclass(slots=True)
class Ggml:
    """The functions of libggml-base that are needed here, with their types."""

    library: ctypes.CDLL
    _checked: bool = False
    _op_names: dict[int, str] = field(default_factory=dict)

    @classmethod
    def beside(cls, module_file: str) -> Ggml:
        """Load the library that was built with the module `module_file` of llama_cpp.

        Raises:
            EngineUnavailable: it is not there, or lacks a function.
        """
        from llama_cpp._ctypes_extensions import load_shared_library

        try:
            library = load_shared_library("ggml-base", Path(module_file).resolve().parent / "lib")
            for name, result, arguments in _FUNCTIONS:
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError, RuntimeError) as error:
            raise EngineUnavailable(
                f"llama-cpp-python has no usable ggml library: {error}; reinstall it: pip install 'kvdrift[llamacpp]'"
            ) from error
        return cls(library)

    def tensor(self, address: int) -> Tensor:
        """Return the tensor at `address`."""
        tensor = Tensor(self, address, TensorStruct.from_address(address))
        if not self._checked:
            self._check(tensor)
            self._checked = True
        return tensor

    def op_name(self, op: int) -> str:
        """Return the name of an operation, such as MUL_MAT."""
        name = self._op_names.get(op)
        if name is None:
            name = self._op_names[op] = self.library.ggml_op_name(op).decode()
        return name

    def type_name(self, kind: int) -> str:
        """Return the name of a tensor type, such as q8_0."""
        return str(self.library.ggml_type_name(kind).decode())

    def row_size(self, kind: int, n_elements: int) -> int:
        """Return the bytes that `n_elements` take in a row of this type."""
        return int(self.library.ggml_row_size(kind, n_elements))

    def to_float(self, kind: int, packed: Bytes, n_elements: int) -> NDArray[np.float32]:
        """Return `n_elements` of a block format, [element], unpacked from contiguous bytes by ggml's own function.

        NaN and infinities come out as the format holds them.
        """
        out = np.empty(n_elements, dtype=np.float32)
        if kind == _FLOAT32:  # the one type that has no function of its own
            return out if not n_elements else np.ascontiguousarray(packed).view(np.float32).ravel().copy()
        packed = np.ascontiguousarray(packed)
        self._traits(kind).to_float(packed.ctypes.data, out.ctypes.data, n_elements)
        return out

    def from_float(self, kind: int, values: Array) -> Bytes:
        """Return `values` [...] packed into a type, as bytes, by ggml's own function.

        What a NaN becomes in a block format is up to ggml; it may spoil its block.
        """
        plain = np.ascontiguousarray(values, dtype=np.float32).ravel()
        if kind == _FLOAT32:
            return plain.view(np.uint8).copy()
        out = np.empty(self.row_size(kind, plain.size), dtype=np.uint8)
        self._traits(kind).from_float(plain.ctypes.data, out.ctypes.data, plain.size)
        return out

    def _traits(self, kind: int) -> Any:
        traits = self.library.ggml_get_type_traits(kind).contents
        if traits.type_name != self.library.ggml_type_name(kind):
            raise EngineUnavailable(_LAYOUT.format(what="ggml_type_traits"))
        return traits

    def _check(self, tensor: Tensor) -> None:
        """Refuse a library whose ggml_tensor is laid out otherwise: what was read would be noise."""
        named = self.library.ggml_get_name(tensor.address)
        size = int(self.library.ggml_nbytes(tensor.address))
        if named != tensor.struct.name or size != tensor.n_bytes:
            raise EngineUnavailable(_LAYOUT.format(what="ggml_tensor"))


_LAYOUT = "this build of llama.cpp lays out {what} in a way that kvdrift does not know; pip install 'kvdrift[llamacpp]'"
_FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
    ("ggml_op_name", ctypes.c_char_p, [ctypes.c_int]),
    ("ggml_op_desc", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_type_name", ctypes.c_char_p, [ctypes.c_int]),
    ("ggml_row_size", ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    ("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), [ctypes.c_int]),
    ("ggml_backend_buffer_is_host", ctypes.c_bool, [ctypes.c_void_p]),
    ("ggml_backend_tensor_get", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    ("ggml_backend_tensor_set", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a graph that is being computed; valid only inside the callback that handed it over."""

    ggml: Ggml
    address: int
    struct: TensorStruct

    @cached_property
    def name(self) -> str:
        return bytes(self.struct.name).decode(errors="replace")

    @cached_property
    def op(self) -> str:
        return self.ggml.op_name(self.struct.op)

    @property
    def description(self) -> str:
        """The name of the operation, with which function it applies where it is one of several."""
        return str(self.ggml.library.ggml_op_desc(self.address).decode())

    @property
    def kind(self) -> int:
        """The number of its type in enum ggml_type."""
        return int(self.struct.type)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes in numpy's order, the fastest axis last."""
        ne = self.struct.ne
        return (ne[3], ne[2], ne[1], ne[0])

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """The bytes from its first element to the end of its last one."""
        ne, nb = self.struct.ne, self.struct.nb
        if self.n_elements == 0:
            return 0
        row = self.ggml.row_size(self.kind, ne[0]) if self.kind not in _PLAIN else nb[0] * (ne[0] - 1) + self._itemsize
        return int(row + sum((ne[i] - 1) * nb[i] for i in (1, 2, 3)))

    def source(self, index: int) -> Tensor | None:
        """Return an operand of the operation that makes this tensor."""
        address = self.struct.src[index]
        return self.ggml.tensor(address) if address else None

    @property
    def view_source(self) -> Tensor | None:
        """The tensor that this one is a view of."""
        return self.ggml.tensor(self.struct.view_src) if self.struct.view_src else None

    def parameter(self, index: int) -> float:
        """Return one parameter of the operation as a float."""
        return float(np.frombuffer(self.struct.op_params, dtype=np.float32)[index])

    def values(self) -> Array:
        """Return [ne3, ne2, ne1, ne0] of a plain type: a view of the engine's memory where that is host memory."""
        dtype = _PLAIN[self.kind]
        raw = self._bytes()
        nb = self.struct.nb
        # A strided view; numpy wants a buffer of the dtype, and the end of the last element may lack padding.
        return np.ndarray(self.shape, dtype=dtype, buffer=raw, strides=(nb[3], nb[2], nb[1], nb[0]))

    def rows_at(self, axis: int, index: NDArray[np.int64]) -> Array:
        """Return a copy of `values().take(index, axis)`, NaN included; a block format comes as float32.

        Args:
            axis: counted as in `shape`; not the last one for a block format, whose rows cannot be cut.
            index: [row], the numbers of the rows.
        """
        if self.is_plain:
            return np.ascontiguousarray(self.values().take(index, axis=axis))
        packed = np.ascontiguousarray(self.packed_rows().take(index, axis=axis))
        n_elements = math.prod(packed.shape[:3]) * self.shape[3]
        return self.ggml.to_float(self.kind, packed, n_elements).reshape(*packed.shape[:3], self.shape[3])

    @property
    def is_dense(self) -> bool:
        """Whether its elements are of a plain type and lie side by side."""
        return self.is_plain and self.n_bytes == self.n_elements * self._itemsize

    @property
    def is_plain(self) -> bool:
        """Whether each element stands by itself, which it does not in a block format."""
        return self.kind in _PLAIN

    def packed_rows(self) -> Bytes:
        """Return [ne3, ne2, ne1, byte] of a block format: a view of the engine's memory where that is host memory."""
        nb, shape = self.struct.nb, self.shape
        row = self.ggml.row_size(self.kind, shape[3])
        return np.ndarray((*shape[:3], row), np.uint8, buffer=self._bytes(), strides=(nb[3], nb[2], nb[1], 1))

    def write(self, values: Array) -> None:
        """Replace all elements of a contiguous tensor of a plain type; `values` [...] has any shape of the same size.

        NaN is written like any other value.

        Raises:
            ValueError: there are not as many values as elements.
        """
        data = np.ascontiguousarray(values, dtype=_PLAIN[self.kind])
        if data.nbytes != self.n_bytes or data.size != self.n_elements:
            raise ValueError(f"{self.name} holds {self.n_elements} elements in {self.n_bytes} bytes, not {data.size}")
        self._set(data.ctypes.data, 0, data.nbytes)

    @property
    def _itemsize(self) -> int:
        return _PLAIN[self.kind].itemsize

    def _bytes(self) -> Bytes:
        size = self.n_bytes
        data = self.struct.data
        if data and self._is_host:
            return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(data))
        copy = np.empty(size, dtype=np.uint8)
        self.ggml.library.ggml_backend_tensor_get(self.address, copy.ctypes.data, 0, size)
        return copy

    def _set(self, source: int, offset: int, size: int) -> None:
        if self.struct.data and self._is_host:
            ctypes.memmove(self.struct.data + offset, source, size)
        else:
            self.ggml.library.ggml_backend_tensor_set(self.address, source, offset, size)

    @property
    def _is_host(self) -> bool:
        buffer = self.struct.buffer
        if not buffer and self.struct.view_src:
            buffer = TensorStruct.from_address(self.struct.view_src).buffer
        return not buffer or bool(self.ggml.library.ggml_backend_buffer_is_host(buffer))
