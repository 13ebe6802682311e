"""A PyTorch model as what faults are planted into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from kvdrift.capture.prompts import Encode
from kvdrift.engines.base import LiveEngine
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.hf.load import load_model, resolve_dtype
from kvdrift_bench.models.tiny import tiny_model
from kvdrift_bench.planted.facts import FaultFacts, Tally
from kvdrift_bench.planted.torch import CleanTwin, Commits, Fault, clean_twins, corpus_for
from kvdrift_bench.run.options import EMBEDDED, TINY
from kvdrift_bench.run.records import Place
from kvdrift_bench.run.subjects import Planted


@dataclass(frozen=True, slots=True)
class TorchHost:
    """A loaded model under the name that results carry; see `kvdrift_bench.run.subjects.Host`."""

    name: str
    dtype: str
    attention: str
    model: Any
    encode: Encode | None

    @property
    def n_layers(self) -> int:
        config = self.model.config
        return int(getattr(config, "get_text_config", lambda **_: config)(decoder=True).num_hidden_layers)

    def faults(self) -> Sequence[Fault]:
        return corpus_for(self.n_layers)

    def twins(self) -> Sequence[CleanTwin]:
        return clean_twins()

    def why_not(self, planted: Planted) -> str | None:
        if isinstance(planted, Fault):
            if planted.needs is not None:
                return f"needs the scenario {planted.needs}"
            if self.dtype not in planted.dtypes:
                return f"has no effect at {self.dtype}"
        assert isinstance(planted, Fault | CleanTwin)
        return planted.applies(self.model)

    def places(self, fault: FaultFacts) -> list[Place]:
        return [(layer, str(site)) for layer, site in fault.places(self.model)]

    @contextmanager
    def run(self, planted: Planted | None) -> Iterator[tuple[LiveEngine, Tally]]:
        assert planted is None or isinstance(planted, Fault | CleanTwin)
        planting = nullcontext(Commits()) if planted is None else planted.plant(self.model)
        with planting as commits, HFEngine(self.model, name=self.name) as engine:
            yield engine, commits

    def encoder(self, engine: LiveEngine) -> Encode | None:
        return self.encode


def open_torch(spec: str, dtype: str, attention: str, say: Callable[[str], None] | None = None) -> TorchHost:
    """Load what `--model` names: `default`, `tiny:ARCHITECTURE`, or anything that an audit takes.

    Raises:
        UsageError: the model does not exist, or cannot run in this way.
        EngineUnavailable: it cannot be loaded.
    """
    if spec.startswith(TINY):
        wanted = resolve_dtype(dtype)
        assert wanted is not None
        return TorchHost(spec, dtype, attention, tiny_model(spec.removeprefix(TINY), wanted, attention), None)
    from kvdrift.engines.encode import encoder

    loaded = load_model(None if spec == EMBEDDED else spec, dtype=dtype, attention=attention, progress=say)
    return TorchHost(loaded.name, dtype, attention, loaded.model, encoder(loaded.tokenizer))
