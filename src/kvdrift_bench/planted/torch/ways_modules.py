"""The ways in which something is planted in modules: their inputs, outputs, arguments, attributes and states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn

from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import mixer_modules
from kvdrift_bench.planted.torch.ways import Way

Modules = Callable[[nn.Module], Iterable[nn.Module]]


def in_outputs(modules: Modules) -> Callable[[Callable[[Any, tuple[Any, ...], Any], Any]], Way]:
    """Change what modules return: the change gets the module, its positional arguments and its output, and returns a
    new output, or None to leave it."""

    def seam(change: Callable[[Any, tuple[Any, ...], Any], Any]) -> Way:
        @wraps(change)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                wrong = change(module, args, output) if commits.decoding else None
                return None if wrong is None else commits.take(output, wrong)

            with _hooked(module.register_forward_hook(after) for module in modules(model)):
                yield

        return way

    return seam


def in_inputs(modules: Modules) -> Callable[[Callable[[Any, Tensor], Tensor | None]], Way]:
    """Change the first positional tensor that modules are called with: the change gets the module and the tensor."""

    def seam(change: Callable[[Any, Tensor], Tensor | None]) -> Way:
        @wraps(change)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
                wrong = change(module, args[0]) if commits.decoding else None
                return None if wrong is None else (commits.take(args[0], wrong), *args[1:])

            with _hooked(module.register_forward_pre_hook(before) for module in modules(model)):
                yield

        return way

    return seam


def in_argument(modules: Modules, name: str) -> Callable[[Callable[[Tensor], Tensor]], Way]:
    """Change the keyword argument `name` of modules."""

    def seam(change: Callable[[Tensor], Tensor]) -> Way:
        @wraps(change)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if not commits.decoding or kwargs.get(name) is None:
                    return None
                return args, {**kwargs, name: commits.take(kwargs[name], change(kwargs[name]))}

            with _hooked(module.register_forward_pre_hook(before, with_kwargs=True) for module in modules(model)):
                yield

        return way

    return seam


def in_attribute(
    owners: Callable[[nn.Module], Iterable[Any]], names: Callable[[Any], Iterable[str]]
) -> Callable[[Callable[[Any], Any]], Way]:
    """Change attributes, buffers or parameters of `owners` for the length of each decode step.

    The change gets the value that the attribute has, and returns the one that it shall have.
    """

    def seam(change: Callable[[Any], Any]) -> Way:
        @wraps(change)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            kept: list[tuple[Any, str, Any]] = []

            def enter(module: nn.Module, args: Any) -> None:
                if not commits.decoding:
                    return
                for owner in owners(model):
                    for name in names(owner):
                        value = getattr(owner, name)
                        kept.append((owner, name, value))
                        wrong = commits.take(value, change(value))
                        is_parameter = isinstance(value, nn.Parameter)
                        setattr(owner, name, nn.Parameter(wrong, requires_grad=False) if is_parameter else wrong)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                while kept:
                    setattr(*kept.pop())

            hooks = [
                model.register_forward_pre_hook(enter),
                model.register_forward_hook(leave, always_call=True),
            ]
            with _hooked(hooks):
                try:
                    yield
                finally:
                    leave(model, (), None)

        return way

    return seam


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class StateCall:
    """The recurrent states of one mixer on a decode step, before or after it ran; changed in place."""

    layer: int
    module: Any
    conv: Tensor
    ssm: Tensor
    commits: Commits


def in_states_before(change: Callable[[StateCall], bool]) -> Way:
    """Change recurrent states in place before a mixer runs; True says that it was done."""

    @wraps(change)
    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            _visit(change, module, kwargs.get("cache_params"), commits)

        with _hooked(m.register_forward_pre_hook(enter, with_kwargs=True) for m in mixer_modules(model)):
            yield

    return way


def in_states_after(change: Callable[[StateCall], bool]) -> Way:
    """Change recurrent states in place after a mixer ran; True says that it was done."""

    @wraps(change)
    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            _visit(change, module, kwargs.get("cache_params"), commits)

        with _hooked(m.register_forward_hook(leave, with_kwargs=True) for m in mixer_modules(model)):
            yield

    return way


def _visit(change: Callable[[StateCall], bool], module: Any, cache: Any, commits: Commits) -> None:
    if not commits.decoding or cache is None:
        return
    layer = cache.layers[module.layer_idx]
    conv, ssm = layer.conv_states[0], layer.recurrent_states[0]
    clean = conv.clone(), ssm.clone()
    if change(StateCall(module.layer_idx, module, conv, ssm, commits)):
        commits.take(clean, (conv, ssm))
