"""What a model is apart from its eager code and its eval mode, and the generators of random numbers that it may use."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import nn

_COMPILED = (
    "%s compiled (torch.compile): the eager code was recorded and judged, since hooks cannot see into compiled code. "
    "The logits of the compiled code were held against the eager ones for one prompt, see the unobserved run"
)
_TRAINING = (
    "the model was handed over in train mode and audited in eval mode, without dropout; call model.eval() before "
    "generating"
)


def unwrapped(model: Any) -> Any:
    """Return the model inside what `torch.compile` returned, or the model itself."""
    return getattr(model, "_orig_mod", model)


def compiled_parts(model: Any) -> list[str]:
    """Return the names of all modules whose calls may go through `torch.compile`, "the model" for the whole.

    A module is compiled as a whole, in place (`module.compile()`), by its `forward`, or holds a compiled function.
    """
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        if (
            hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
            or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())
        ):
            found.append(name or "the model")
    return found


def compiled_in(function: Any) -> list[str]:
    """Return the names of what a function of a caller's own holds that goes through `torch.compile`: itself, a variable
    that it closes over, or a global one that it names."""
    code = getattr(function, "__code__", None)
    held = {"the function": function, "its object": getattr(function, "__self__", None)}
    if code is not None:
        cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
        held |= {name: _content(cell) for name, cell in cells}
        held |= {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    return [name for name, value in held.items() if _is_compiled(value)]


def _content(cell: Any) -> Any:
    """What a cell of a closure holds, None for one that is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_compiled(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return bool(compiled_parts(value))
    held = vars(value) if hasattr(value, "__dict__") else {}
    return "_torchdynamo_orig_callable" in held


# Packages whose own code compiles nothing of a model while it runs.
_OF_LIBRARIES = frozenset(
    ("builtins", "numpy", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "optimum")
)


def may_compile(*sources: Any) -> bool:
    """Return whether code of a caller's own names a compiler: that of functions, or of the classes of modules and of
    other objects, and of what these call or close over.

    A model that names none is spared the calls that it takes to see one at work: what happens once in its life may
    happen there.
    """
    waiting: list[Any] = []
    for source in sources:
        modules = list(source.modules()) if isinstance(source, nn.Module) else []
        waiting += [each for module in modules for each in vars(module).values() if callable(each)]
        waiting += modules or [source]
    met: set[int] = set()
    while waiting:
        value = waiting.pop()
        value = inspect.unwrap(value) if inspect.isfunction(value) else value
        kind = value if isinstance(value, type) or inspect.isfunction(value) else type(value)
        if inspect.ismethod(value):
            waiting += [value.__func__, type(value.__self__)]
        elif isinstance(value, functools.partial):
            waiting.append(value.func)
        elif id(kind) not in met and str(kind.__module__).partition(".")[0] not in _OF_LIBRARIES:
            met.add(id(kind))
            if inspect.isfunction(kind):
                if _names_compiler(kind.__code__):
                    return True
                waiting += [_content(cell) for cell in kind.__closure__ or ()]
                waiting += [kind.__globals__[name] for name in kind.__code__.co_names if name in kind.__globals__]
            else:
                waiting += [each for base in kind.__mro__ for each in vars(base).values() if inspect.isfunction(each)]
    return False


def _names_compiler(code: CodeType) -> bool:
    nested = (each for each in code.co_consts if isinstance(each, CodeType))
    return "compile" in code.co_names or any(_names_compiler(each) for each in nested)


@contextmanager
def compilers_noticed(found: list[str]) -> Iterator[None]:
    """Add to `found` what calls modules from compiled code while the context is open.

    A model may compile its step when it makes the first one, and keep what came out where nobody looks. Functions that
    call no module, such as a kernel, are what a module calls in eager code too, and are left as they are.
    """

    def look(graph: Any, inputs: Any) -> Any:
        nodes = getattr(getattr(graph, "graph", None), "nodes", ())
        if any(node.meta.get("nn_module_stack") for node in nodes) and not found:
            found.append("a function that the model compiles when it runs")
        return graph.forward

    with torch.compiler.set_stance("default", force_backend=look):
        yield


def eager(parts: list[str]) -> AbstractContextManager[Any]:
    """Run what is compiled as the eager code that it was made of while the context is open."""
    return torch.compiler.set_stance("force_eager") if parts else nullcontext()


def caveats_of(model: Any, parts: list[str]) -> Iterator[tuple[str, str]]:
    """Yield code and text of what an audit of this model does not say."""
    if parts:
        what = f"{parts[0]} is" if len(parts) == 1 else f"{len(parts)} modules ({parts[0]}, ...) are"
        yield "COMPILED", _COMPILED % what
    if isinstance(model, nn.Module) and model.training:
        yield "EVAL_MODE", _TRAINING


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off while the context is open, module by module, and back on as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(slots=True)
class Draws:
    """Watches the generators of random numbers that all share: torch's, numpy's and Python's own."""

    device: torch.device
    draws: bool = False
    _before: list[bytes] = field(default_factory=list)

    def __enter__(self) -> None:
        """Note where the generators stand."""
        self._before = self._states()

    def __exit__(self, *exc: object) -> None:
        """Note whether one of them moved."""
        self.draws = self.draws or self._states() != self._before

    def _states(self) -> list[bytes]:
        kind = torch.get_device_module(self.device) if self.device.type != "cpu" else None
        on_device = [] if kind is None else [kind.get_rng_state(self.device).numpy().tobytes()]
        _, words, place, *_ = np.random.get_state(legacy=True)  # noqa: NPY002
        return [
            torch.get_rng_state().numpy().tobytes(),
            *on_device,
            np.asarray(words).tobytes() + str(place).encode(),
            repr(random.getstate()).encode(),
        ]
