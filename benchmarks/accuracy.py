"""Whether the verdicts are right on the embedded default model: clean runs and planted faults."""

from __future__ import annotations

import argparse
import time
from itertools import product

import kvdrift
from benchmarks.support import demo, say
from kvdrift.faults import corpus_for

# Twenty unlike texts: prose, code, numbers, other scripts, repetition, one word.
PROMPTS = (
    "The quick brown fox jumps over the lazy dog and runs into the forest.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "Once upon a time there lived an old clockmaker who could not hear the hours strike.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    "Translate to French: The weather is nice today.",
    "Q: What is the boiling point of water at sea level?\nA:",
    "La neige tombait depuis trois jours sur le village endormi.",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY",
    "the the the the the the the the the the the the",
    "Hello",
    "In 1969 two astronauts landed on the Moon while a third stayed in orbit. Their names were",
    '{"id": 17, "tags": ["a", "b"], "nested": {"deep": true, "value":',
    "Roses are red, violets are blue,",
    "Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк.",
    "E = mc^2 relates energy and mass. The integral of x^2 from 0 to 1 is",
    "Dear Sir or Madam,\n\nI am writing to complain about the noise that",
    "A list of colours: red, orange, yellow, green,",
    "#include <stdio.h>\nint main(void) {\n    printf(",
    "The patient presented with a fever of 39.5 degrees, a dry cough, and",
    "!!! ??? ... --- *** +++ === ### @@@ $$$ %%% ^^^",
)


def _settings(options: argparse.Namespace) -> list[tuple[str, str]]:
    return list(product(options.dtypes.split(","), options.attn.split(",")))


def run_clean(options: argparse.Namespace) -> bool:
    """Audit the clean model on every prompt by itself; a single MISMATCH is a failure."""
    alarms = n_audits = 0
    for dtype, attention in _settings(options):
        loaded = demo(dtype, attention)
        verdicts: dict[str, int] = {}
        worst = 0.0
        for text in PROMPTS[: options.prompts]:
            result = kvdrift.audit(loaded.model, loaded.tokenizer, prompts={"p": text})
            verdicts[result.verdict] = verdicts.get(result.verdict, 0) + 1
            n_audits += 1
            alarms += result.verdict in (kvdrift.Verdict.MISMATCH, kvdrift.Verdict.INCONCLUSIVE)
            worst = max([worst, *(e.statistic or 0.0 for e in result.evidence if e.instrument == "ladder")])
        say(f"{dtype:9} {attention:6} {verdicts} largest excess {worst:.1e} (bound 1)")
    say(f"{alarms} alarms in {n_audits} clean audits")
    return alarms == 0


def run_faults(options: argparse.Namespace) -> bool:
    """Plant every fault; the verdict, the layer and the site must be right."""
    wrong = n_audits = 0
    for dtype, attention in _settings(options):
        loaded = demo(dtype, attention)
        for fault in corpus_for(loaded.model.config.num_hidden_layers):
            began = time.perf_counter()
            with fault.plant(loaded.model):
                result = kvdrift.audit(loaded.model, loaded.tokenizer, prompts={"p": PROMPTS[0]})
            first = result.first_failure
            right = (
                result.verdict is kvdrift.Verdict.MISMATCH
                and first is not None
                and first.site in fault.sites
                and first.layer == (fault.layer or 0)
            )
            n_audits += 1
            wrong += not right
            mark = "ok   " if right else "WRONG"
            say(f"{mark} {dtype:9} {attention:6} {fault.name:22} {first} ({time.perf_counter() - began:.1f} s)")
    say(f"{n_audits - wrong} of {n_audits} found at their true address")
    return wrong == 0
