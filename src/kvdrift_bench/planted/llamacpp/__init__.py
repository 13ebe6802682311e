"""Faults and clean twins that are planted into llama.cpp, through the callback of its graph scheduler."""

from kvdrift_bench.planted.llamacpp.corpus import clean_twins, corpus_for
from kvdrift_bench.planted.llamacpp.model import Grounds, LlamaFault, LlamaTwin, survey

__all__ = ["Grounds", "LlamaFault", "LlamaTwin", "clean_twins", "corpus_for", "survey"]
