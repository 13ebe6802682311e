"""Which module plays which role: one short forward pass is watched, and tensors are followed from module to module.

Roles are found by what a module reads and writes, not by a list of model names: the attention module is the one that
updates the cache, its norm is the module whose output it reads, the residual is what the next norm reads. Names of
submodules are consulted only where data cannot tell (which of two equal-shaped projections is the query's).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvdrift.engines.torch.fused import Pick, blocks, grouped, keys_in_front, of_groups
from kvdrift.engines.torch.residual import STREAM
from kvdrift.engines.torch.seen import BatchRow
from kvdrift.engines.torch.stacks import Stack, longest_stack, stack_around, stack_at, stack_of_most, stacks_of
from kvdrift.engines.torch.weights import has_experts, matrix_numbers
from kvdrift.vocabulary.sites import Site

When = Literal["in", "out"]

_PROJECTIONS = {
    Site.Q_PROJ: re.compile(r"^(q|query|wq|q_lin|to_q)(_proj)?$"),
    Site.K_PROJ: re.compile(r"^(k|key|wk|k_lin|to_k)(_proj)?$"),
    Site.V_PROJ: re.compile(r"^(v|value|wv|v_lin|to_v)(_proj)?$"),
}
_HEAD_NORMS = {
    Site.Q_NORM: re.compile(r"^(q|query)_?(layer)?_?norm$"),
    Site.K_NORM: re.compile(r"^(k|key)_?(layer)?_?norm$"),
}


@dataclass(frozen=True, slots=True)
class Tap:
    """Where one site is read: the input or output of `module`, tokens along `token_dim`, `pick` for a part of it.

    `is_alone` says of a residual stream that nothing of its shape stands beside it in the first short step.
    """

    module: nn.Module
    site: Site
    when: When
    token_dim: int
    pick: Pick | None = None
    is_alone: bool = False


@dataclass(slots=True)
class LayerRoles:
    """The taps of one decoder layer.

    Attributes:
        index: the number of the layer.
        module: the layer; one that is called, or a list of modules that are.
        attention: the module that attends, None in a layer that keeps no keys and values.
        n_heads: heads of the query, None if nothing tells.
        taps: where its sites are read.
        has_interface: whether what attention reads is seen when it is called.
        updates_cache: whether it is told what goes into the cache.
        at_kernel: whether what attention reads is taken from the calls of torch inside of it.
        in_front: how many keys that belong to no token it reads in front of those of tokens.
        enters: of a layer that is not called itself, the module that reads its input first.
        leaves: of such a layer, the module that makes its output.
    """

    index: int
    module: nn.Module
    attention: nn.Module | None = None
    n_heads: int | None = None
    taps: list[Tap] = field(default_factory=list)
    has_interface: bool = False
    updates_cache: bool = False
    at_kernel: bool = False
    in_front: int = 0
    enters: nn.Module | None = None
    leaves: nn.Module | None = None


@dataclass(slots=True)
class ModelRoles:
    """The roles of a whole model; `taps` are those outside the layers."""

    layers: list[LayerRoles]
    final_norm: nn.Module | None
    taps: list[Tap]


@dataclass(slots=True)
class _Event:
    """One module call: its name, and the tensors that went in and came out."""

    name: str
    module: nn.Module
    depth_path: tuple[str, ...]
    inputs: list[Tensor]
    outputs: list[Tensor]
    order: int = 0


@dataclass(slots=True)
class _Attended:
    """One attention call as seen from the cache or the attention interface."""

    path: tuple[str, ...]
    value: Tensor | None = None  # [1, kv head, token, dim] new values, before the cache
    query: Tensor | None = None  # [1, head, token, dim]
    context: Tensor | None = None  # [1, token, head, dim], what the attention call of torch gave
    read: Tensor | None = None  # [1, kv head, key, dim], all values that attention reads
    via_interface: bool = False
    via_cache: bool = False
    n_kernels: int = 0  # attention calls of torch that were seen


class Survey:
    """Watches one forward pass of `n_tokens` tokens; `roles()` then says who does what.

    Every tensor seen is kept alive until then, so that addresses of memory identify tensors.
    """

    def __init__(self, model: nn.Module, n_tokens: int, at: BatchRow = BatchRow()) -> None:  # noqa: B008
        self._model, self._at = model, at
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._n_tokens = n_tokens
        self._stack: list[str] = []
        self._events: list[_Event] = []
        self._open: list[_Event] = []
        self._started: list[_Event] = []
        self._attended: dict[str, _Attended] = {}
        self._clock = 0

    def dtypes(self) -> set[torch.dtype]:
        """The floating-point dtypes of everything that modules returned."""
        found = {tensor.dtype for event in self._events for tensor in event.outputs}
        return {dtype for dtype in found if dtype.is_floating_point}

    def hooks(self) -> list[Any]:
        """Register the watchers on every module; the caller removes the returned handles."""
        handles: list[Any] = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True, always_call=True))
        return handles

    def cache_updated(self, layer: int, keys: Tensor, values: Tensor, all_keys: Tensor, all_values: Tensor) -> None:
        """Note that the module now running adds `values` to the cache."""
        attended = self._current()
        attended.via_cache = True
        attended.value = values.detach().clone()

    def attention_called(self, query: Tensor, value: Tensor) -> None:
        """Note that the module now running calls attention with `query` and `value`, [1, head, token or key, dim]."""
        attended = self._current()
        attended.via_interface = True
        attended.query, attended.read = query.detach(), value.detach()

    def kernel_called(self, query: Tensor, key: Tensor, value: Tensor, context: Tensor | None) -> None:
        """Note that an attention call of torch reads these, [1, head, token, dim] and [1, kv head, key, dim], and gives
        `context` [1, token, head, dim].

        It belongs to the innermost module around it that has weights: what has none is a part of it.
        """
        path = tuple(self._stack)
        while path and not _is_heavy(self._modules[path[-1]]):
            path = path[:-1]
        if not path:
            return
        attended = self._attended.setdefault(path[-1], _Attended(path))
        attended.n_kernels += 1
        attended.query, attended.read = query.detach(), value.detach()
        attended.value = of_groups(value.detach()[:, :, : self._n_tokens]).clone()
        attended.context = None if context is None else context.detach().clone()

    def _current(self) -> _Attended:
        path = tuple(self._stack)
        key = path[-1] if path else ""
        return self._attended.setdefault(key, _Attended(path))

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append(name)
            inputs = self._of_row([*_tensors(args), *_tensors(kwargs.get("hidden_states"))])
            self._open.append(_Event(name, module, tuple(self._stack), inputs, []))
            self._started.append(self._open[-1])

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._stack or self._stack[-1] != name:
                return  # a hook of the model's own failed before this one saw the module
            self._stack.pop()
            event = self._open.pop()
            event.outputs = self._of_row(_tensors(output))
            event.order = self._clock
            self._clock += 1
            self._events.append(event)

        return leave

    def _of_row(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._at.of(tensor) for tensor in tensors]

    def looped(self) -> tuple[str, int] | None:
        """Return the first decoder layer that ran more than once, and how often; None if there is none."""
        stack = self._stack_of_layers()
        for path in () if stack is None else stack.paths:
            n_calls = sum(event.name == path for event in self._events)
            if n_calls > 1:
                return path, n_calls
        return None

    def is_in_parts(self, container_path: str | None = None) -> bool:
        """Whether a layer ran more than once, or was given another number of tokens than those that were fed."""
        if self.looped() is not None:
            return True
        roles = self.roles(container_path)
        return roles is None or any(all(tap.site is not Site.LAYER_IN for tap in layer.taps) for layer in roles.layers)

    def roles(self, container_path: str | None = None) -> ModelRoles | None:
        """Return who plays which role, or None if no stack of decoder layers was found.

        `container_path` names what holds the layers, where a caller knows it.
        """
        stack = self._stack_of_layers()
        if container_path is not None and container_path in self._modules:
            stack = stack_at(self._modules, container_path)
        if stack is None:
            return None
        layers = [
            self._layer(index, path, module)
            for index, (path, module) in enumerate(zip(stack.paths, stack.modules, strict=True))
        ]
        final_norm, taps = self._outer(stack, has_output=any(tap.site is Site.LAYER_OUT for tap in layers[-1].taps))
        return ModelRoles(layers, final_norm, taps)

    def _stack_of_layers(self) -> Stack | None:
        """The stack that holds the attention modules; without attention, the longest one whose items all ran."""
        stacks = [*stacks_of(self._modules)]
        if any(attended.n_kernels for attended in self._attended.values()):
            return stack_of_most(stacks, [attended.path[-1] for attended in self._attended.values()])
        attending = [attended.path for attended in self._attended.values()]
        return stack_around(stacks, attending) or longest_stack(stacks, {event.name for event in self._events})

    def _unwatched_layer(self, roles: LayerRoles, name: str, events: list[_Event]) -> _Event | None:
        """What a layer that is not called itself reads and gives: the input of the first module that runs in it, and
        the output of the last one."""
        order = [event for event in self._started if event.name.startswith(name + ".") and event.inputs]
        last = max(events, key=lambda event: event.order, default=None)
        if not order or last is None or not last.outputs:
            return None
        roles.enters, roles.leaves = order[0].module, last.module
        return _Event(name, roles.module, (*order[0].depth_path[:-1], name), order[0].inputs, last.outputs, last.order)

    def _layer(self, index: int, name: str, module: nn.Module) -> LayerRoles:
        roles = LayerRoles(index, module)
        events = [event for event in self._events if event.name.startswith(name + ".")]
        own = next((event for event in self._events if event.name == name), None)
        own = own or self._unwatched_layer(roles, name, events)
        if own is None:
            return roles
        self._tap(roles.taps, roles.enters or module, Site.LAYER_IN, "in", own.inputs)
        self._tap(roles.taps, roles.leaves or module, Site.LAYER_OUT, "out", own.outputs)
        attended = self._attended_in(name)
        children = [event for event in events if event.depth_path[-2:-1] == (name,)]
        if roles.enters is not None:
            children = [event for event in events if event.depth_path[:-1] == own.depth_path[:-1]]
        if attended is None:
            self._unseen(roles, own, children, events)
            return roles
        attention = own if attended.path[-1] == name else next(e for e in events if e.name == attended.path[-1])
        roles.attention = attention.module
        roles.has_interface, roles.updates_cache = attended.via_interface, attended.via_cache
        if attended.n_kernels == 1 and not attended.via_interface:
            roles.has_interface = roles.at_kernel = True
        roles.n_heads = attended.query.shape[1] if attended.query is not None else _configured_heads(attention.module)
        if attention is own:  # attention is a part of a layer that has no modules for its parts
            return roles
        self._tap(roles.taps, attention.module, Site.ATTN_OUT, "out", attention.outputs)
        self._attention_inside(roles, attended, attention, events)
        norm = _producer(children, attention.inputs, before=attention.order)
        if norm is not None:
            self._tap(roles.taps, norm.module, Site.ATTN_NORM_OUT, "out", norm.outputs)
        # The attention module may sit below the layer's direct child (GPT-Neo, BERT-like wrappers).
        outer = next((event for event in children if attention.name.startswith(event.name)), attention)
        self._mlp(roles, own, children, after=outer.order, attention=norm)
        return roles

    def _attended_in(self, name: str) -> _Attended | None:
        """The attention of a layer: the module that updates the cache, or else the first one that attends.

        Others may attend to something other than tokens: residuals of Inkling 2 do to the blocks of layers below.
        """
        inside = [a for key, a in self._attended.items() if key == name or key.startswith(name + ".")]
        return next((attended for attended in inside if attended.via_cache), next(iter(inside), None))

    def _unseen(self, roles: LayerRoles, own: _Event, children: list[_Event], events: list[_Event]) -> None:
        """Tap a layer of which no attention was seen: a recurrent one, or one with a kernel of its own. Of two parts
        with weights the first mixes tokens."""
        heavy = [event for event in children if event.outputs and _is_heavy(event.module)]
        mixer = heavy[0] if len(heavy) == 2 else None
        if mixer is None:
            self._mlp(roles, own, children, after=-1, attention=None)
            return
        norm = _producer(children, mixer.inputs, before=mixer.order)
        if norm is not None:
            self._tap(roles.taps, norm.module, Site.ATTN_NORM_OUT, "out", norm.outputs)
        self._attention_inside(roles, _Attended((mixer.name,)), mixer, events)
        self._tap(roles.taps, mixer.module, Site.ATTN_OUT, "out", mixer.outputs)
        self._mlp(roles, own, children, after=mixer.order, attention=norm)

    def _mlp(
        self, roles: LayerRoles, own: _Event, children: list[_Event], after: int, attention: _Event | None
    ) -> None:
        """Tap the feed-forward part: the heaviest child after attention, its norm, and what that norm reads."""
        later = [e for e in children if e.order > after and e.outputs and _is_heavy(e.module)]
        if not later or (after < 0 and roles.attention is None and len(later) < 2):
            return
        mlp = max(later, key=lambda e: matrix_numbers(e.module))
        self._tap(roles.taps, mlp.module, Site.MLP_OUT, "out", mlp.outputs)
        router = next((e for e in self._events if e.name.startswith(mlp.name + ".") and _is_router(e)), None)
        if router is not None and has_experts(mlp.module):
            self._tap(roles.taps, router.module, Site.ROUTER, "out", router.outputs)
        norm = _producer(children, mlp.inputs, before=mlp.order)
        if norm is None or norm is attention:
            source = mlp if norm is None else None
        else:
            self._tap(roles.taps, norm.module, Site.FFN_NORM_OUT, "out", norm.outputs)
            source = norm
        # With a parallel residual the norm reads the layer's own input: there is no residual after attention to see.
        if source is not None and source.inputs and not _same(source.inputs[0], own.inputs):
            self._tap(roles.taps, source.module, Site.RESID_ATTN, "in", source.inputs)

    def _attention_inside(
        self, roles: LayerRoles, attended: _Attended, attention: _Event, events: list[_Event]
    ) -> None:
        inside = [e for e in events if e.name.startswith(attention.name + ".") and e.outputs]
        for event in inside:
            child = event.name.rpartition(".")[2]
            for site, pattern in (_PROJECTIONS | _HEAD_NORMS).items():
                if pattern.match(child):
                    self._tap(roles.taps, event.module, site, "out", event.outputs)
        self._head_norms(roles, inside)
        linear = [e for e in inside if _is_heavy(e.module) and not _has_heavy_children(e.module)]
        made = [attended.value.transpose(1, 2)] if attended.via_cache and attended.value is not None else []
        made += [event.outputs[0] for event in linear if not attended.via_cache]
        roles.in_front = max((keys_in_front(attended.read, each, self._n_tokens) for each in made), default=0)
        tapped = {tap.site for tap in roles.taps}
        if Site.V_PROJ not in tapped and attended.value is not None:
            self._fused(roles, attended.value, linear)
        last = linear[-1] if linear else None
        if (
            last is not None
            and not _same(last.outputs[0], attention.outputs)
            and not (attended.n_kernels or attended.via_cache)
        ):
            return  # what it makes is no output, so that it need not be the output projection
        if last is not None and last.inputs and not attended.via_interface and _hands_on(attended, last.inputs[0]):
            self._tap(roles.taps, last.module, Site.ATTN_CTX, "in", last.inputs)

    def _head_norms(self, roles: LayerRoles, inside: list[_Event]) -> None:
        """Tap norms of queries and keys, whatever they are called: modules with a weight of one axis that read what a
        projection made, and nothing else."""
        made = {tap.site: tap.module for tap in roles.taps if tap.site in _PROJECTIONS and tap.pick is None}
        for projection, norm in ((Site.Q_PROJ, Site.Q_NORM), (Site.K_PROJ, Site.K_NORM)):
            given = [event.outputs[0] for event in inside if event.module is made.get(projection)]
            for event in inside:
                if len(event.inputs) == 1 and _is_norm(event.module) and _same(event.inputs[0], given):
                    self._tap(roles.taps, event.module, norm, "out", event.outputs)

    def _fused(self, roles: LayerRoles, value: Tensor, linear: list[_Event]) -> None:
        """Find how one projection holds q, k and v, by looking for the values that went into the cache."""
        _, kv_heads, n_tokens, dim = value.shape
        wanted = value[0].transpose(0, 1).reshape(n_tokens, -1)
        heads = roles.n_heads or kv_heads
        for event in linear:
            out = event.outputs[0]
            if out.ndim != 3 or out.shape[1] != n_tokens or out.shape[-1] != (heads + 2 * kv_heads) * dim:
                continue
            for layout in (blocks, grouped):
                picks = layout(heads, kv_heads, dim)
                if torch.equal(picks[Site.V_PROJ](out)[0], wanted):
                    roles.taps.extend(Tap(event.module, site, "out", 1, pick) for site, pick in picks.items())
                    return

    def _outer(self, stack: Stack, *, has_output: bool) -> tuple[nn.Module | None, list[Tap]]:
        """Taps outside the layers: the token embedding, and the last norm after the layers, which is returned if it
        reads what the last layer hands on."""
        taps: list[Tap] = []
        find: Any = getattr(self._model, "get_input_embeddings", None)
        embedding = find() if find is not None else self._first_embedding()
        for event in self._events:
            if event.module is embedding:
                self._tap(taps, event.module, Site.EMBED_OUT, "out", event.outputs)
                break
        inside = [e for e in self._events if stack.item_of(e.name) is not None]
        last_layer = max((e.order for e in inside), default=-1)
        handed_on = next((e.outputs for e in reversed(inside) if e.name in stack.paths), [])
        for event in self._events:
            outside = event.order > last_layer and stack.item_of(event.name) is None
            # A norm that reads something else may be one inside of the head, which sees the wanted tokens alone. Where
            # a layer hands on no tensor of its own, nothing can be read directly.
            is_next = _same(event.inputs[0], handed_on) if event.inputs else False
            beside = not has_output and event.name.startswith(stack.around + ".")
            is_norm = "norm" in type(event.module).__name__.lower() and bool(event.outputs)
            if outside and is_norm and (is_next or beside):
                self._tap(taps, event.module, Site.FINAL_NORM_OUT, "out", event.outputs)
                return (event.module if is_next else None), taps
        return None, taps

    def _first_embedding(self) -> nn.Module | None:
        """The first table that a row was taken out of for every token."""
        return next((event.module for event in self._events if isinstance(event.module, nn.Embedding)), None)

    def _tap(self, taps: list[Tap], module: nn.Module, site: Site, when: When, tensors: list[Tensor]) -> None:
        if not tensors or any(tap.site is site for tap in taps):
            return
        token_dim = _token_dim(tensors[0], self._n_tokens)
        if token_dim is not None:
            is_alone = site in STREAM and all(other.shape != tensors[0].shape for other in tensors[1:])
            taps.append(Tap(module, site, when, token_dim, is_alone=is_alone))


def _hands_on(attended: _Attended, given: Tensor) -> bool:
    """Whether what the output projection is given is what attention gave: a gate or a norm may stand between."""
    context = attended.context
    if attended.n_kernels != 1 or context is None:
        return True
    return context.numel() == given.numel() and torch.equal(context.to(given.dtype).flatten(), given.flatten())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [item for item in value if isinstance(item, Tensor)]
    return []


def _token_dim(tensor: Tensor, n_tokens: int) -> int | None:
    """The axis that counts tokens: the second of [batch, token, ...], the third of [batch, head, token, dim], or the
    first of a flattened [token, ...]."""
    if tensor.ndim >= 3 and tensor.shape[0] == 1:
        return next((dim for dim in (1, 2) if tensor.shape[dim] == n_tokens), None)
    return 0 if tensor.ndim >= 2 and tensor.shape[0] == n_tokens else None


def _same(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor.data_ptr() == o.data_ptr() and tensor.numel() == o.numel() for o in others)


def _producer(events: list[_Event], inputs: list[Tensor], before: int) -> _Event | None:
    """The last normalisation that ran before and whose output is what the consumer reads."""
    if not inputs:
        return None
    for event in reversed(events):
        if event.order < before and event.outputs and _same(event.outputs[0], inputs[:1]):
            return event if not _is_heavy(event.module) else None
    return None


def _is_heavy(module: nn.Module) -> bool:
    """Whether a module holds a weight matrix, in whatever form: projections and MLPs do, norms and dropouts do not."""
    return matrix_numbers(module) > 0


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has weights of one axis and no others."""
    weights = [*module.parameters()]
    return bool(weights) and all(weight.ndim == 1 for weight in weights)


def _has_heavy_children(module: nn.Module) -> bool:
    return any(_is_heavy(child) for child in module.children())


def _is_router(event: _Event) -> bool:
    child = event.name.rpartition(".")[2]
    return "router" in type(event.module).__name__.lower() or child in {"gate", "router"}


def _configured_heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    heads = getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None
