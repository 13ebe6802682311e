"""What a model keeps beside its parameters: attributes and buffers of its modules, and how to put them back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What every module has, and what others put there on purpose while an audit runs: parts, hooks, the mode.
_OF_TORCH = frozenset(vars(nn.Module())) - {"_buffers"}
_MOST_ELEMENTS = 1 << 16  # of a tensor whose contents are kept, to put them back; larger ones are left as they are


@dataclass(frozen=True, slots=True)
class _Kept:
    """One value as it was; of a small tensor and of a container also what was in it."""

    value: Any
    version: int = 0
    content: Any = None

    @classmethod
    def of(cls, value: Any) -> _Kept:
        if isinstance(value, Tensor) and not value.is_meta and not isinstance(value, nn.Parameter):
            small = value.numel() <= _MOST_ELEMENTS and type(value) is Tensor and not value.is_inference()
            return cls(value, value._version if small else 0, value.detach().clone() if small else None)
        return cls(value, content=value.copy() if type(value) in (dict, list, set) else None)

    def put_back(self) -> bool:
        """Put back what was in the value, and say whether that was needed."""
        value, content = self.value, self.content
        if content is None:
            return False
        if isinstance(value, Tensor):
            if value._version == self.version or torch.equal(value, content):
                return False
            value.detach().copy_(content)
            return True
        if _same(value, content):
            return False
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)
        return True


@dataclass(slots=True)
class ModelState:
    """The state of a model at one moment."""

    model: nn.Module
    _kept: dict[str, tuple[dict[str, Any], dict[str, _Kept]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, owner in _owners(self.model):
            self._kept[name] = owner, {key: _Kept.of(owner[key]) for key in owner if key not in _OF_TORCH}

    def restore(self, *, with_buffers: bool) -> tuple[str, ...]:
        """Put back what has changed since, and return its names.

        `with_buffers` is False while buffers are held at another precision.
        """
        changed = []
        for name, (owner, kept) in self._kept.items():
            if name.endswith(_BUFFERS) and not with_buffers:
                continue
            for key in [key for key in owner if key not in _OF_TORCH and key not in kept]:
                del owner[key]
                changed.append(f"{name}{key}")
            for key, before in kept.items():
                is_other = key not in owner or owner[key] is not before.value
                if is_other:
                    owner[key] = before.value
                if before.put_back() or is_other:
                    changed.append(f"{name}{key}")
        return tuple(name.replace(_BUFFERS, "") for name in changed)


_BUFFERS = "buffers:"


def _owners(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dictionaries that hold the state of each module, with what stands before a name in it."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        yield prefix, vars(module)
        yield prefix + _BUFFERS, module._buffers


def _same(value: Any, content: Any) -> bool:
    """Whether a container holds the very objects that it held."""
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(key in content and content[key] is item for key, item in value.items())
    if isinstance(value, list):
        return all(item is other for item, other in zip(value, content, strict=True))
    return bool(value == content)
