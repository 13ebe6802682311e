"""The generation loop of transformers itself, `model.generate`, watched call by call with the cache that it makes.

A first run is left to itself and only watched: which tokens each row stands for before every choice, and the scores
that the choice is made from. A later run, at another precision, is handed the same scores again by a logits processor,
the last one in line, so that it makes the same choices, and with them the same calls. The processor works on scores
after the forward call; neither the model nor its cache is touched by it.

Where drafts come from, see `kvdrift.engines.hf.drafts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvdrift.engines.base import CallProbe, FedRow, Generated, Generation, Sink
from kvdrift.engines.hf.caches import CacheAdapter, CacheKind, OwnCache
from kvdrift.engines.hf.drafts import DraftModelWatch, drafting, why_no_draft_model
from kvdrift.engines.hf.kinds import inner_model, parameters_taken
from kvdrift.engines.hf.quiet import quiet_transformers
from kvdrift.engines.torch.armed import Armed
from kvdrift.engines.torch.frames import Lane
from kvdrift.engines.torch.weights import device_of
from kvdrift.errors import CaptureError, NotApplicable
from kvdrift.vocabulary.facts import Plant

_PAD = 0  # the token that padding is made of; it is masked, so that its value cannot matter
_Scores = dict[tuple[int, ...], Tensor]


class LoopRecording(Protocol):
    """The engine, as far as the loop needs it."""

    model: Any
    cache_argument: str

    def lane(self, row: int, pad: int, probe: Sequence[int], sink: Sink, start: int, q_len: int) -> Lane: ...

    def recording(
        self,
        cache: CacheAdapter,
        *,
        start: int,
        q_len: int,
        lanes: tuple[Lane, ...],
        n_rows: int,
        held: int | None = None,
        replace: Mapping[int, Any] | None = None,
        plant: Plant | None = None,
    ) -> AbstractContextManager[Armed]: ...

    def finish(self, lanes: tuple[Lane, ...], call: Armed, cache: CacheAdapter, logits: Sequence[Tensor]) -> None: ...

    def model_errors(self, what: str) -> AbstractContextManager[None]: ...


@dataclass(slots=True)
class _Call:
    """One forward call: the slots before it, its tokens, the logits that it gave, and what its rows then stood for,
    padding and all."""

    start: int
    q_len: int
    n_logits: int = 0
    rows: tuple[tuple[int, ...], ...] = ()


class Loop:
    """One run of `generate` on a cache of the kind `cache`; `config` says how each layer attends. The others are those
    of `Routes.generate_again`."""

    def __init__(
        self,
        engine: LoopRecording,
        config: Any,
        cache: CacheKind,
        wanted: Generation,
        again: Generated | None = None,
        probes: Sequence[CallProbe] = (),
        plant: tuple[int, Plant] | None = None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
        self._cache = cache
        self._wanted = wanted
        self._again = again
        self._probes = probes
        self._plant = plant
        longest = max(len(prompt) for prompt in wanted.prompts)
        self._pads = [longest - len(prompt) for prompt in wanted.prompts for _ in range(wanted.n_beams)]
        self._calls: list[_Call] = []
        self._scores: _Scores = {}
        self._no_numbers: str | None = None
        self._drafts = DraftModelWatch(again, lambda: len(self._calls))
        self._open: tuple[Armed, tuple[Lane, ...], CacheAdapter] | None = None
        self._stack = ExitStack()

    def run(self) -> Generated:
        """Generate, and return what was done.

        Raises:
            CaptureError: the loop broke off, or did not make the calls of the run before again.
            NotApplicable: it runs another model than the one that is watched.
        """
        model = self._engine.model
        device = device_of(model)
        longest = max(len(prompt) for prompt in self._wanted.prompts)
        padded = [[_PAD] * (longest - len(prompt)) + list(prompt) for prompt in self._wanted.prompts]
        ids = torch.tensor(padded, dtype=torch.long, device=device)
        handles: list[Any] = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        options = _options(model, self._config, self._cache, self._wanted, self._engine.cache_argument)
        several = f" of {len(padded)} prompts" if len(padded) > 1 else ""
        try:
            with (
                quiet_transformers(),
                _neutral(model),
                drafting(model, self._wanted, self._drafts) as drafts,
                self._engine.model_errors(f"generate{several}"),
            ):
                output = model.generate(ids, logits_processor=_processors(self._choose), **options, **drafts)
        finally:
            for handle in handles:
                handle.remove()
            self._stack.close()
        if not self._calls:
            raise NotApplicable(_runs_another(model))
        return self._done(output.sequences)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get(self._engine.cache_argument)
        if ids is None or cache is None:
            raise CaptureError("generate called the model without token ids, or without a cache")
        n_call, (n_rows, q_len), adapter = len(self._calls), ids.shape, CacheAdapter(cache, self._kinds)
        held = adapter.held
        start = sum(call.q_len for call in self._calls) if held is None else held
        if self._again is not None:
            # Positions are those of the tokens, whatever the cache holds.
            start = self._expected(n_call, n_rows, q_len)
        lanes = tuple(
            self._engine.lane(probe.row, self._pads[probe.row], probe.positions, probe.sink, start, q_len)
            for probe in self._probes
            if probe.call == n_call
        )
        self._calls.append(_Call(start, q_len))
        plant = self._plant[1] if self._plant is not None and self._plant[0] == n_call else None
        call = self._stack.enter_context(
            self._engine.recording(
                adapter, start=start, q_len=q_len, lanes=lanes, n_rows=n_rows, held=held, plant=plant
            )
        )
        self._open = call, lanes, adapter

    def _expected(self, n_call: int, n_rows: int, q_len: int) -> int:
        """Return the slot at which a call begins that has to be the one of the run before."""
        assert self._again is not None
        before = self._again.calls[n_call] if n_call < len(self._again.calls) else ()
        if len(before) != n_rows or before[0].n_fed != q_len:
            raise CaptureError(
                f"generate did not make the same calls again: call {n_call} fed {n_rows} rows of {q_len} tokens"
            )
        return len(before[0].tokens) + self._pads[0] - q_len

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        opened, self._open = self._open, None
        self._stack.close()
        logits = getattr(output, "logits", None)
        if opened is None or logits is None:
            return
        (call, lanes, adapter), n_logits = opened, logits.shape[1]
        self._calls[-1].n_logits = min(n_logits, call.q_len)
        behind = n_logits - call.q_len
        self._engine.finish(lanes, call, adapter, [logits[lane.row, lane.row_index + behind] for lane in lanes])

    def _choose(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Note what the rows of the last call stand for, and hand back the scores from which the next token is chosen:
        those that came, or those of the run before. A draft model is given the same processor, and is let alone."""
        if self._drafts.running:
            return scores
        rows = tuple(tuple(row) for row in ids.tolist())
        if self._calls and len(rows[0]) > len((self._calls[-1].rows or ((),))[0]):
            # Drafts are looked at one after the other; the longest row has them all.
            self._calls[-1].rows = rows
        if self._again is None:
            self._scores.update((row, scores[index].clone()) for index, row in enumerate(rows))
            self._look_for_nan(scores)
            return scores
        before = self._again.choices
        assert isinstance(before, dict)
        if not before.keys() >= set(rows):
            raise CaptureError(f"generate did not reach the same tokens again at call {len(self._calls)}")
        return torch.stack([before[row] for row in rows]).to(scores)

    def _look_for_nan(self, scores: Tensor) -> None:
        """Note the first call that left nothing to choose from."""
        broken = scores.isnan().any(dim=-1).nonzero().flatten().tolist()
        if not broken or self._no_numbers is not None:
            return
        row, pad = broken[0], self._pads[broken[0]]
        padded = f", which begins with {pad} slots of padding," if pad else ""
        self._no_numbers = (
            f"in generate itself the logits of row {row}{padded} are NaN at forward call {len(self._calls) - 1}, in "
            f"the model's own precision, so that its choices mean nothing"
        )
        if pad and str(next(self._engine.model.parameters()).dtype) == "torch.float64":
            self._no_numbers += (
                "; eager attention of transformers takes its softmax in float32, which cannot hold the mask of a "
                "float64 model: use attn_implementation='sdpa' or another dtype"
            )

    def _done(self, sequences: Tensor) -> Generated:
        pads = self._pads
        calls = tuple(
            tuple(
                FedRow(tokens[pads[row] :], min(call.q_len, len(tokens) - pads[row]), call.n_logits)
                for row, tokens in enumerate(call.rows)
            )
            for call in self._calls
        )
        returned = tuple(tuple(row[pads[index] :]) for index, row in enumerate(sequences.tolist()))
        if self._again is not None and (returned, calls) != (self._again.sequences, self._again.calls):
            raise CaptureError("generate did not return the same tokens again, from the same scores")
        choices = self._scores if self._again is None else self._again.choices
        return Generated(self._wanted, returned, calls, choices, self._drafts.error, self._no_numbers)


def _runs_another(model: nn.Module) -> str:
    found = inner_model(model)
    inside = "" if found is None else f"; pass that one, model.{found[0]}"
    return f"the generate of {type(model).__name__} runs another model{inside}"


def why_not_generate(model: Any, cache: CacheKind, ability: str) -> str | None:
    """Say why a model's `generate` cannot be run; `ability` is "generate" for without drafts, "drafts" for those of a
    list, "draft_model" for those of a draft model. None if it can."""
    drafts = ability != "generate"
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        return "the model has no generate"
    if not hasattr(model, "generation_config"):
        return _runs_another(model)
    if drafts and cache != "dynamic":
        return "generate verifies drafts on a dynamic cache only"
    if drafts and getattr(model, "_is_stateful", False):
        return "generate verifies no drafts where a recurrent state would have to go back"
    return why_no_draft_model(model) if ability == "draft_model" else None


def _options(model: Any, config: Any, cache: CacheKind, wanted: Generation, cache_name: str) -> dict[str, Any]:
    """The arguments of `generate`: the most likely tokens, `n_new` of them, and nothing that bends the scores."""
    from transformers import GenerationConfig

    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": wanted.n_new,
        "num_beams": wanted.n_beams,
        "num_return_sequences": wanted.n_beams,
        "use_cache": True,
        "return_dict_in_generate": True,
        "pad_token_id": _PAD,
        "disable_compile": True,
        "cache_implementation": "static" if cache == "static" else None,
        "prompt_lookup_num_tokens": wanted.n_drafts if wanted.drafts else None,
    }
    options: dict[str, Any] = {"generation_config": GenerationConfig(**settings)}
    if isinstance(cache, OwnCache):
        options[cache_name] = cache.open(config)
    if "attention_mask" in parameters_taken(model):
        longest = max(len(prompt) for prompt in wanted.prompts)
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in wanted.prompts]
        options["attention_mask"] = torch.tensor(mask, device=device_of(model))
    return options


@contextmanager
def _neutral(model: Any) -> Iterator[None]:
    """Give the model an empty generation configuration while the context is open: whatever is not set in a call is
    taken from there (penalties, forbidden and forced words, the tokens that end a text)."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _processors(choose: Any) -> Any:
    from transformers import LogitsProcessorList

    def last_word(input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen: Tensor = choose(input_ids, scores)
        return chosen

    return LogitsProcessorList([last_word])
