"""Which tiny model carries which planted fault, as in `kvdrift-bench scenarios`."""

from kvdrift_bench.models.carriers import CARRIERS, N_LAYERS, PROMPT, PROMPTS, SPAN, carrier_of, lively, one_thread

__all__ = ["CARRIERS", "N_LAYERS", "PROMPT", "PROMPTS", "SPAN", "carrier_of", "lively", "one_thread"]
