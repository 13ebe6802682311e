"""Files of transformers' model debugger: one folder a forward call, a JSON tree of modules and their tensors.

With `use_repr=False` whole tensors lie beside the tree as safetensors files. With the default, tensors are printed: a
large one only at its corners, and a float32 with five digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from ml_dtypes import bfloat16

from kvdrift.errors import TraceError
from kvdrift.trace.model import Trace
from kvdrift.trace.readers.passes import LoadedPass, PassFiles, parse_name, read_stated, recording_of
from kvdrift.trace.recording import Recording, files_under, inside
from kvdrift.trace.store import read_tensors
from kvdrift.vocabulary.address import Spot
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.sites import Site

TREE = "_debug_tree_FULL_TENSORS.json"
_MAX_TREE = 1 << 30  # bytes
_CORNER = 3  # values that torch prints at each end of a large tensor
_PRINTED = 5e-5  # relative, of a number printed as 1.2345e-01
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)(?:\.(.*))?$")
_DTYPES: dict[str, Any] = {
    "torch.bfloat16": bfloat16,
    "torch.float16": np.float16,
    "torch.float32": np.float32,
    "torch.float64": np.float64,
    "torch.int64": np.int64,
}

# What a module gives, inside a layer and outside. The debugger keeps the outputs of modules without children only.
_OUTPUTS = {
    "input_layernorm": Site.ATTN_NORM_OUT,
    "self_attn.q_proj": Site.Q_PROJ,
    "self_attn.k_proj": Site.K_PROJ,
    "self_attn.v_proj": Site.V_PROJ,
    "self_attn.q_norm": Site.Q_NORM,
    "self_attn.k_norm": Site.K_NORM,
    "self_attn.o_proj": Site.ATTN_OUT,
    "post_attention_layernorm": Site.FFN_NORM_OUT,
    "mlp.down_proj": Site.MLP_OUT,
}
_INPUTS = {"": Site.LAYER_IN, "self_attn.o_proj": Site.ATTN_CTX, "post_attention_layernorm": Site.RESID_ATTN}
_OUTSIDE = {"embed_tokens": Site.EMBED_OUT, "norm": Site.FINAL_NORM_OUT, "lm_head": Site.LOGITS}
# With norms around both parts these modules mean something else.
_SANDWICH = "pre_feedforward_layernorm"


class _Node(msgspec.Struct):
    module_path: str
    inputs: Any = None
    outputs: Any = None
    children: list[_Node] = []


def is_debugger(directory: Path) -> bool:
    """Whether a directory holds trees of the debugger."""
    return bool(files_under(directory, TREE))


def open_debugger(directory: Path) -> Recording:
    """Open a directory of `PROMPT.prefill/` and `PROMPT.decode/`, each with one forward call of the debugger; several
    decode steps lie in folders of their own inside `PROMPT.decode/`.

    Raises:
        TraceError: a folder is not named so, or its tree is damaged.
    """
    trees: dict[Path, list[Path]] = {}
    for path in files_under(directory, TREE):
        folder = path.parent
        if folder != directory and ".decode" not in folder.name and ".prefill" not in folder.name:
            folder = folder.parent
        trees.setdefault(folder, []).append(path)
    passes = []
    for folder, paths in sorted(trees.items()):
        prompt, kind, mode = parse_name(folder, folder.name)
        passes.append(PassFiles(folder, prompt, kind, mode, partial(_load, directory, paths, prompt, kind)))
    if not passes:
        raise TraceError(f"{directory} holds no file *{TREE}")
    facts = read_stated(directory)
    return recording_of(
        f"calls of transformers' model debugger ({len(passes)} passes)",
        "transformers",
        passes,
        facts,
        digits=_PRINTED,
    )


def _load(directory: Path, paths: list[Path], prompt: str, kind: str, tokens: tuple[int, ...] | None) -> LoadedPass:
    trace: Trace | None = None
    printed: set[Spot] = set()
    counts = [0, 0]
    for path in sorted(paths):
        root = _tree(path)
        reader = _Reader(directory, path)
        ids = reader.integers(_find(root, "input_ids"), "input_ids")
        positions = reader.positions(root, len(ids))
        known = tuple(ids) if tokens is None or kind != "decode" else tokens
        if [known[p] if p < len(known) else None for p in positions] != ids:
            raise TraceError(
                f"{path}: the token ids {ids[:4]} at {positions[0]} are not those of the prefill of {prompt!r}"
            )
        if trace is None:
            trace = Trace(prompt, "decode" if kind == "decode" else "prefill", kind, "", known)
        trace.calls.append(Call(positions[0], len(ids), positions[0], None, "unknown", ()))
        for site, layer, tensor in _tensors(root):
            values, n_elements = reader.rows(tensor, len(ids))
            if values is None:
                continue
            where = tuple(positions[-len(values) :])
            trace.rung = trace.rung or values.dtype.name
            trace.add_rows(layer, site, where, values)
            counts[0] += values[-1].size
            counts[1] += n_elements
            if reader.is_printed and values.dtype.itemsize > 2:
                printed |= {(layer, site, position) for position in where}
    assert trace is not None
    if not trace.rows:
        raise TraceError(f"{paths[0]} holds no tensor of a known module; a Llama-like model is expected")
    return LoadedPass(trace, counts[0], counts[1], frozenset(printed))


def _tensors(root: _Node) -> Iterator[tuple[Site, int | None, dict[str, Any]]]:
    nodes = list(_walk(root))
    sandwich = any(node.module_path.endswith(_SANDWICH) for node in nodes)
    last = max((int(m[1]) for node in nodes if (m := _LAYER.search(node.module_path))), default=None)
    for node in nodes:
        match = _LAYER.search(node.module_path)
        name = (match[2] or "") if match else node.module_path.rpartition(".")[2]
        layer = int(match[1]) if match else None
        gives = _OUTPUTS if match else _OUTSIDE
        site, takes = gives.get(name), _INPUTS.get(name) if match else None
        if sandwich and name == "post_attention_layernorm":
            site = takes = None
        if sandwich and name == _SANDWICH:
            site, takes = Site.FFN_NORM_OUT, Site.RESID_ATTN
        if site is not None and _is_tensor(node.outputs):
            yield site, layer, node.outputs
        given = _first_input(node.inputs)
        if takes is not None and given is not None:
            yield takes, layer, given
        if match is None and name == "norm" and given is not None and last is not None:
            yield Site.LAYER_OUT, last, given


def _walk(node: _Node) -> Iterator[_Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and {"shape", "dtype", "value"} <= value.keys()


def _first_input(inputs: Any) -> dict[str, Any] | None:
    if not isinstance(inputs, dict):
        return None
    args, named = inputs.get("args"), inputs.get("kwargs")
    candidates = [
        *(args if isinstance(args, list) else []),
        *([named.get("hidden_states")] if isinstance(named, dict) else []),
    ]
    return next((item for item in candidates if _is_tensor(item)), None)


def _find(root: _Node, name: str) -> dict[str, Any] | None:
    """The first input of that name anywhere in the tree; token ids may also be the first positional argument."""
    for node in _walk(root):
        named = node.inputs.get("kwargs") if isinstance(node.inputs, dict) else None
        if isinstance(named, dict) and _is_tensor(named.get(name)):
            found: dict[str, Any] = named[name]
            return found
    return _first_input(root.inputs) if name == "input_ids" else None


def _tree(path: Path) -> _Node:
    try:
        if path.stat().st_size > _MAX_TREE:
            raise TraceError(f"{path} is larger than {_MAX_TREE >> 20} MB; record with use_repr=False")
        return msgspec.json.decode(path.read_bytes(), type=_Node)
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path} is not a tree of the model debugger: {error}") from error


class _Reader:
    """Reads the tensors that a tree holds or names."""

    def __init__(self, directory: Path, tree: Path) -> None:
        self._directory, self._tree = directory, tree
        self.is_printed = False

    def integers(self, tensor: dict[str, Any] | None, what: str) -> list[int]:
        """Return the integers of a tensor of one sequence."""
        if tensor is None:
            raise TraceError(f"{self._tree} has no {what}; call the model with input_ids=... inside the debugger")
        shape = self._shape(tensor)
        if len(shape) == 2 and shape[0] != 1:
            raise TraceError(f"{self._tree}: {what} has the shape {shape}; debug one sequence at a time")
        values, _ = self._values(tensor)
        found = [int(value) for value in values.reshape(-1)]
        if len(found) != int(np.prod(shape)):
            raise TraceError(f"{self._tree}: {what} is printed in part; record with use_repr=False")
        return found

    def positions(self, root: _Node, n_tokens: int) -> list[int]:
        """Return the positions of the tokens that were fed; without them the call is taken to start a sequence."""
        for name in ("position_ids", "cache_position"):
            tensor = _find(root, name)
            if tensor is not None:
                found = self.integers(tensor, name)
                if len(found) == n_tokens and found == list(range(found[0], found[0] + n_tokens)) and found[0] >= 0:
                    return found
                raise TraceError(
                    f"{self._tree}: {name} is {found[:4]} for {n_tokens} tokens, which do not follow each other"
                )
        return list(range(n_tokens))

    def rows(self, tensor: dict[str, Any], n_tokens: int) -> tuple[np.ndarray[Any, Any] | None, int]:
        """Return [token, element] of a tensor, the last token alone where it is printed, and the elements of a row."""
        shape = self._shape(tensor)
        values, whole = self._values(tensor)
        if len(shape) < 3 or shape[0] != 1 or values.dtype.kind in "iu":
            return None, 0
        width = int(np.prod(shape[2:]))
        rows = values.reshape(shape[1], width)[-n_tokens:] if whole else values.reshape(1, -1)
        if isinstance(tensor["value"], list) and rows.shape[1] > 2 * _CORNER:
            # Printed whole in one call and in part in another, one tensor must stay comparable with itself.
            rows = np.concatenate([rows[:, :_CORNER], rows[:, -_CORNER:]], axis=1)
        return rows, width

    def _shape(self, tensor: dict[str, Any]) -> list[int]:
        text = tensor["shape"]
        found = [int(n) for n in re.findall(r"\d+", text)] if isinstance(text, str) and len(text) < 200 else []
        if not found or not 0 < np.prod([float(n) for n in found]) < 1 << 40:
            raise TraceError(f"{self._tree} holds a tensor of the shape {text!r}")
        return found

    def _values(self, tensor: dict[str, Any]) -> tuple[np.ndarray[Any, Any], bool]:
        """The values and whether they are all of them; of a printed part, the last row."""
        dtype = _DTYPES.get(tensor["dtype"]) if isinstance(tensor["dtype"], str) else None
        if dtype is None:
            raise TraceError(f"{self._tree} holds a tensor of the dtype {tensor['dtype']!r}")
        value = tensor["value"]
        if isinstance(value, str):
            path = inside(self._directory, self._tree.parent / value)
            found = read_tensors(path).get("data")
            if found is None or list(found.shape) != self._shape(tensor):
                raise TraceError(f"{path} does not hold the tensor that {self._tree.name} says it does")
            return found, True
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise TraceError(f"{self._tree} holds a tensor whose value is neither a file nor printed")
        self.is_printed = True
        text = "".join(value)
        body = text[text.find("[") : text.rfind("]") + 1]
        shape = self._shape(tensor)
        try:
            if "..." not in body:
                numbers = [float(n) for n in re.findall(r"[-+0-9.eE]+|nan|-?inf", body)]
                return np.array(numbers).astype(dtype).reshape(shape), True
            last = body[body.rfind("[") :]
            return np.array([float(n) for n in re.findall(r"-?nan|-?inf|[-+]?\d[-+0-9.eE]*", last)]).astype(
                dtype
            ), False
        except ValueError as error:
            raise TraceError(f"{self._tree} holds a tensor that is not printed as torch prints one: {error}") from error
