"""The ways in which something is planted in methods: of a cache, and of a model that runs its own generation loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.ways import Way

# Is called with the method as it is, None if there is none, with the `Commits`, and with the arguments of the call.
Instead = Callable[..., Any]


def in_method(name: str) -> Callable[[Instead], Way]:
    """Replace a method of dynamic caches: it is called as `instead(original, commits, cache, ...)`."""

    def seam(instead: Instead) -> Way:
        @functools.wraps(instead)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            from transformers import DynamicCache

            with _replaced(DynamicCache, name, instead, commits):
                yield

        return way

    return seam


def in_class_of_model(name: str) -> Callable[[Instead], Way]:
    """Replace a method that the loop looks up on the class of the model: `instead(original, commits, model, ...)`."""

    def seam(instead: Instead) -> Way:
        @functools.wraps(instead)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            with _replaced(type(model), name, instead, commits):
                yield

        return way

    return seam


def in_loop(name: str) -> Callable[[Instead], Way]:
    """Replace a method that the loop looks up on the model: it is called as `instead(original, commits, ...)`, and one
    that the model does not have is given to it."""

    def seam(instead: Instead) -> Way:
        @functools.wraps(instead)
        @contextmanager
        def way(model: nn.Module, commits: Commits) -> Iterator[None]:
            original = getattr(model, name, None)
            before = model.__dict__.get(name)

            def method(*args: Any, **kwargs: Any) -> Any:
                return instead(original, commits, *args, **kwargs)

            model.__dict__[name] = method if original is None else functools.wraps(original)(method)
            try:
                yield
            finally:
                del model.__dict__[name]
                if before is not None:
                    model.__dict__[name] = before

        return way

    return seam


@contextmanager
def _replaced(owner: type, name: str, instead: Instead, commits: Commits) -> Iterator[None]:
    """Replace a method of a class, or give it one, and put back what it had of its own."""
    own, original = owner.__dict__.get(name), getattr(owner, name, None)

    def method(*args: Any, **kwargs: Any) -> Any:
        return instead(original, commits, *args, **kwargs)

    setattr(owner, name, method if original is None else functools.wraps(original)(method))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
