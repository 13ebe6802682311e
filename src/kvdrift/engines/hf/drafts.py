"""Where the generation loop of transformers takes its drafts from: a list, or a small draft model that the loop runs.

The draft model is made by kvdrift, of the vocabulary of the model, and taught one text by its output head alone: it
proposes most of that text and is wrong now and then, so that drafts are accepted and rejected on every model. A second
run of the loop runs it again, and proposes what it proposed the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvdrift.engines.base import Generated, Generation

_SEED = 7
_SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
# Of the taught tokens, one in so many is another one: a call verifies four drafts, so that most calls reject some.
_WRONG_EVERY = 3


class Drafts:
    """A draft source of transformers (a candidate generator) that proposes the tokens of a list, `n_drafts` at a time
    and one less than is still wanted, since a call gives a token more than it verifies."""

    requires_model_outputs = False

    def __init__(self, wanted: Generation) -> None:
        self._wanted = wanted

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return the tokens so far with the next drafts behind them."""
        wanted = self._wanted
        done = input_ids.shape[1] - len(wanted.prompts[0])
        return _behind(input_ids, wanted.drafts[done : min(done + wanted.n_drafts, wanted.n_new - 1)]), None

    def update_candidate_strategy(self, *_: Any) -> None:
        """Learn nothing from what was accepted."""


class DraftModelWatch:
    """The draft model of one run of a loop.

    Attributes:
        running: whether the draft model itself generates, so that what is seen is not of the model.
        error: what the draft model broke on; from then on nothing is proposed. None if it did not.
    """

    def __init__(self, again: Generated | None, calls_made: Callable[[], int]) -> None:
        self._again = again
        self._calls_made = calls_made
        self.running = False
        self.error: str | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Note what breaks in the draft model while the context is open; the model itself can go on."""
        self.running = True
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the row of the report says it
            line = next(iter(str(error).splitlines()), "")
            self.error = f"{type(error).__name__}: {line}".rstrip(": ")
        finally:
            self.running = False

    def source(self, own: Any) -> Any:
        """Return the draft source that asks `own`, that of transformers, and in a second run proposes what was
        proposed in the first."""
        return _WatchedDrafts(self, own)

    def propose(self, own: Any, input_ids: Tensor) -> Tensor:
        """Return the tokens so far with the next drafts behind them."""
        proposed = input_ids
        if self.error is None:
            with self.guard():
                proposed = own.get_candidates(input_ids)[0]
        if self._again is None:
            return proposed
        n_call = self._calls_made()
        before = self._again.calls[n_call][0].tokens if n_call < len(self._again.calls) else ()
        return _behind(input_ids, before[input_ids.shape[1] :])


class _WatchedDrafts:
    requires_model_outputs = False

    def __init__(self, watch: DraftModelWatch, own: Any) -> None:
        self._watch = watch
        self._own = own

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self._watch.propose(self._own, input_ids), None

    def update_candidate_strategy(self, *_: Any) -> None:
        """Learn nothing from what was accepted: every call gets as many drafts, whatever the precision."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # the loop asks the source for its draft model in the end


@contextmanager
def drafting(model: Any, wanted: Generation, watch: DraftModelWatch) -> Iterator[dict[str, Any]]:
    """Let the model's `generate` take its drafts from the list or the draft model that are wanted while the context is
    open; it yields arguments for `generate`."""
    draft_model = None
    if wanted.draft_text:
        with watch.guard():
            draft_model = build_draft_model(model, wanted.draft_text, wanted.n_new, wanted.n_drafts)
    if not wanted.drafts and draft_model is None:
        yield {}
        return
    name = "_get_candidate_generator"
    before, own = model.__dict__.get(name), getattr(model, name)
    if draft_model is None:
        model.__dict__[name] = lambda **_: Drafts(wanted)
    else:
        model.__dict__[name] = lambda **options: watch.source(own(**options))
    try:
        yield {} if draft_model is None else {"assistant_model": draft_model}
    finally:
        del model.__dict__[name]
        if before is not None:
            model.__dict__[name] = before


def why_no_draft_model(model: Any) -> str | None:
    """Say why no draft model can be made for a model; None if one can."""
    if not isinstance(getattr(model.config.get_text_config(), "vocab_size", None), int):
        return "the size of the vocabulary is not known, so that no draft model can be made for it"
    return None


def build_draft_model(model: Any, text: Sequence[int], n_taught: int, n_drafts: int) -> Any:
    """Return a Llama of one layer, the same random weights each time, on the device and at the dtype of `model`, that
    proposes the last `n_taught` tokens of `text`, every third of them wrong, `n_drafts` at a time.

    Its head is the least-squares solution that puts each of these tokens first behind the text before it, which fits
    where there are fewer of them than hidden values. Where it does not, or is rounded away, more drafts are wrong, and
    nothing else.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=int(model.config.get_text_config().vocab_size),
        num_hidden_layers=1,
        max_position_embeddings=2 * len(text) + n_drafts,
        **_SIZES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        draft: Any = LlamaForCausalLM(config).to(torch.float32).eval()
    taught = torch.tensor(list(text[-n_taught:])) % config.vocab_size
    taught[_WRONG_EVERY - 1 :: _WRONG_EVERY] = (taught[_WRONG_EVERY - 1 :: _WRONG_EVERY] + 1) % config.vocab_size
    with torch.no_grad():
        states = draft.model(torch.tensor([list(text[:-1])])).last_hidden_state[0, -n_taught:]
        weights = torch.linalg.pinv(states.to(torch.float64)).to(torch.float32)  # [hidden, taught]
        draft.lm_head.weight.zero_().index_add_(0, taught, weights.T.contiguous())
    draft.generation_config = GenerationConfig(
        num_assistant_tokens=n_drafts, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    weight = model.get_input_embeddings().weight
    return draft.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)


def _behind(input_ids: Tensor, proposed: Sequence[int]) -> Tensor:
    if not proposed:
        return input_ids
    drafts = torch.tensor([list(proposed)], dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, drafts], dim=-1)
