"""What is audited: models, sets of prompts, and what is planted in a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kvdrift.bench.options import EMBEDDED
from kvdrift.bench.records import Place, SubjectKind
from kvdrift.bench.tiny import PREFIX, tiny_model
from kvdrift.engines.hf.load import load_model, resolve_dtype
from kvdrift.errors import UsageError
from kvdrift.faults import CleanTwin, Commits, Fault, clean_twins, corpus_for
from kvdrift.prompts import Encode, default_prompts
from kvdrift.sites import AFTER_LAYERS, BEFORE_LAYERS

DEFAULT_SET = "set_0"
_PROMPTS_A_SET = 3
_SHORTEST, _LONGEST = 5, 40

# Unlike texts, of which sets of prompts are cut: prose, code, numbers, other scripts, repetition.
_TEXTS = (
    "The quick brown fox jumps over the lazy dog and runs into the forest, where nobody has seen it since last spring.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\nprint(",
    "Once upon a time there lived an old clockmaker who could not hear the hours strike, and so he counted the birds.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765, 10946, 17711, 28657,",
    "Translate to French: The weather is nice today, but tomorrow it will rain, and we shall stay at home and read.",
    "Q: What is the boiling point of water at sea level?\nA: 100 degrees Celsius.\nQ: And on top of a mountain?\nA:",
    "La neige tombait depuis trois jours sur le village endormi, et personne n'avait encore vu passer le facteur.",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 AND placed_on >= '2024-01-01' GROUP BY name HAVING COUNT(*)",
    "the the the the the the the the the the the the the the the the the the the the the the the the the the the the",
    "In 1969 two astronauts landed on the Moon while a third stayed in orbit. Their names were spoken in every house.",
    '{"id": 17, "tags": ["a", "b"], "nested": {"deep": true, "value": null, "list": [1, 2, 3, {"x": 0.5}]}, "end":',
    "Roses are red, violets are blue, the kettle is singing, the toast is burnt too, and breakfast is late for two.",
    "Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк, а потом будем пить чай на старой веранде.",
    "E = mc^2 relates energy and mass. The integral of x^2 from 0 to 1 is 1/3, and the sum of 1/n^2 over n is pi^2/6.",
    "Dear Sir or Madam,\n\nI am writing to complain about the noise that your new machines make from six on",
    '#include <stdio.h>\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf("%d\\n", i * i);\n    }',
    "The patient presented with a fever of 39.5 degrees, a dry cough, and a rash on both arms since Monday.",
    "!!! ??? ... --- *** +++ === ### @@@ $$$ %%% ^^^ &&& ((( ))) [[[ ]]] {{{ }}} <<< >>> /// ||| ~~~ ``` ,,, ;;; :::",
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planted in the model while it is audited; nothing for a clean run."""

    kind: SubjectKind
    name: str
    prompts: str = DEFAULT_SET
    planted: Fault | CleanTwin | None = None

    def plant(self, model: nn.Module) -> AbstractContextManager[Commits]:
        """Plant it while the context is open."""
        return nullcontext(Commits()) if self.planted is None else self.planted.plant(model)

    def why_not(self, model: nn.Module, dtype: str) -> str | None:
        """Why it cannot be run on this model, None if it can."""
        if self.planted is None:
            return None
        if isinstance(self.planted, Fault):
            if self.planted.needs is not None:
                return f"needs the scenario {self.planted.needs}"
            if dtype not in self.planted.dtypes:
                return f"has no effect at {dtype}"
        return self.planted.applies(model)

    def places(self, model: nn.Module) -> list[Place]:
        """The true first places of a fault in this model."""
        if not isinstance(self.planted, Fault):
            return []
        layer = self.planted.first_layer(model)
        outside = BEFORE_LAYERS | AFTER_LAYERS
        return [(None if site in outside else layer, str(site)) for site in self.planted.sites]


def choose_subjects(
    n_layers: int, *, faults: list[str] | None, twins: bool, n_clean: int, n_sets: int = 1
) -> list[Subject]:
    """Return the clean runs, the clean twins and the faults; `faults` names some of them, None is all of them.

    Each fault is run on `n_sets` sets of prompts, each clean run on one of its own.

    Raises:
        UsageError: no fault has one of these names.
    """
    corpus = {fault.name: fault for fault in corpus_for(n_layers)}
    unknown = [name for name in faults or () if name not in corpus]
    if unknown:
        raise UsageError(f"there is no fault {unknown[0]!r}; known: {', '.join(sorted(corpus))}")
    return [
        *(Subject("clean", "clean", f"set_{index}") for index in range(n_clean)),
        *(Subject("twin", twin.name, planted=twin) for twin in (clean_twins() if twins else ())),
        *(
            Subject("fault", name, f"set_{index}", corpus[name])
            for index in range(n_sets)
            for name in (corpus if faults is None else faults)
        ),
    ]


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A loaded model under the name that results carry."""

    name: str
    model: Any
    encode: Encode | None

    @property
    def n_layers(self) -> int:
        config = self.model.config
        return int(getattr(config, "get_text_config", lambda **_: config)(decoder=True).num_hidden_layers)


def open_model(spec: str, dtype: str, attention: str, say: Callable[[str], None] | None = None) -> BenchModel:
    """Load what `--model` names: `default`, `tiny:ARCHITECTURE`, or anything that an audit takes.

    Raises:
        UsageError: the model does not exist, or cannot run in this way.
        EngineUnavailable: it cannot be loaded.
    """
    if spec.startswith(PREFIX):
        wanted = resolve_dtype(dtype)
        assert wanted is not None
        return BenchModel(spec, tiny_model(spec.removeprefix(PREFIX), wanted, attention), None)
    from kvdrift.auditor import encoder

    loaded = load_model(None if spec == EMBEDDED else spec, dtype=dtype, attention=attention, progress=say)
    return BenchModel(loaded.name, loaded.model, encoder(loaded.tokenizer))


def prompt_set(name: str, encode: Encode | None, vocab_size: int) -> dict[str, list[int]]:
    """Return the prompts of a set: those of a default audit for `set_0`, else some of its own, always the same ones."""
    number = int(name.removeprefix("set_"))
    if number == 0:
        return default_prompts(encode, vocab_size)
    rng = np.random.default_rng(number)
    lengths = rng.integers(_SHORTEST, _LONGEST, size=_PROMPTS_A_SET, endpoint=True)
    if encode is None:
        return {f"p{i}": rng.integers(0, vocab_size, size=n).tolist() for i, n in enumerate(lengths)}
    prompts = {}
    for i, (text, length) in enumerate(zip(rng.permutation(len(_TEXTS)), lengths, strict=False)):
        ids = list(encode(_TEXTS[text]))
        start = int(rng.integers(0, max(1, len(ids) - length)))
        prompts[f"p{i}"] = ids[start : start + int(length)]
    return prompts
