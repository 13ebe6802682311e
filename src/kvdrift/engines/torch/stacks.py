"""Which modules of a model are its decoder layers: the items of a list, a dictionary or a sequence of modules, or
attributes that differ by a number."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True, slots=True)
class Stack:
    """Modules that may be layers.

    Attributes:
        path: of what holds them; of the model itself "".
        paths: of the modules, in their order.
        modules: themselves.
        is_list: whether a `ModuleList` holds them, which runs none of its items by itself.
    """

    path: str
    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    is_list: bool = False

    @property
    def around(self) -> str:
        """The path of the module that holds the container."""
        return self.path.rpartition(".")[0] if self.is_list else self.path

    def item_of(self, path: str) -> int | None:
        """The number of the item that is at `path` or holds what is there, None if none does."""
        return next((i for i, own in enumerate(self.paths) if path == own or path.startswith(own + ".")), None)


def stack_at(modules: Mapping[str, nn.Module], path: str) -> Stack:
    """The children of one module as a stack."""
    children = dict(modules[path].named_children())
    paths = tuple(f"{path}.{name}" if path else name for name in children)
    return Stack(path, paths, tuple(children.values()), isinstance(modules[path], nn.ModuleList))


def stacks_of(modules: Mapping[str, nn.Module]) -> Iterator[Stack]:
    """Every stack of a model, whose modules are given by path."""
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            if len(module):
                yield stack_at(modules, path)
            continue
        numbered: dict[str, dict[int, tuple[str, nn.Module]]] = defaultdict(dict)
        for name, child in module.named_children():
            if (match := _NUMBERED.fullmatch(name)) is not None:
                numbered[match[1]][int(match[2])] = (f"{path}.{name}" if path else name, child)
        for items in numbered.values():
            order = sorted(items)
            if len(order) > 1 and order == [*range(order[0], order[0] + len(order))]:
                yield Stack(path, tuple(items[i][0] for i in order), tuple(items[i][1] for i in order))


def stack_of_most(stacks: Collection[Stack], attending: Collection[str]) -> Stack | None:
    """The stack that holds most attention modules apart, given by their paths, the outermost of several: its items are
    the layers."""
    held = {stack: len({stack.item_of(path) for path in attending} - {None}) for stack in stacks}
    most = max(held.values(), default=0)
    found = [stack for stack in stacks if held[stack] == most > 0]
    return min(found, key=lambda stack: stack.paths[0].count("."), default=None)


def stack_around(stacks: Collection[Stack], attending: Collection[Sequence[str]]) -> Stack | None:
    """The innermost stack that an attention module runs in, lists of modules first; `attending` are the paths of what
    was called on the way to each of them. Where several items of a stack have one each, all of these are one."""
    for kind in (True, False):
        for path in attending:
            for name in reversed(path):
                for stack in stacks:
                    if stack.is_list is kind and name in stack.paths:
                        return _with_its_like(stack, stacks)
    return None


def _with_its_like(stack: Stack, stacks: Collection[Stack]) -> Stack:
    """A stack together with those that lie where it does in the other items of the stack around it."""
    by_path = {each.path: each for each in stacks if each.is_list}
    for outer in by_path.values():
        if outer.path == stack.path or (index := outer.item_of(stack.path)) is None:
            continue
        within = stack.path.removeprefix(outer.paths[index])
        alike = [by_path[own + within] for own in outer.paths if own + within in by_path]
        if len(alike) > 1:
            paths = tuple(path for each in alike for path in each.paths)
            return Stack(outer.path, paths, tuple(module for each in alike for module in each.modules), is_list=True)
    return stack


def longest_stack(stacks: Collection[Stack], ran: Collection[str]) -> Stack | None:
    """The longest stack all of whose items ran, lists of modules first."""
    found = [stack for stack in stacks if all(path in ran for path in stack.paths)]
    return max(found, key=lambda stack: (stack.is_list, len(stack.paths), stack.path), default=None)


__all__ = ["Stack", "longest_stack", "stack_around", "stack_at", "stack_of_most", "stacks_of"]
