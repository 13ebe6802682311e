"""Faults and clean twins that are planted into llama.cpp, through the callback of its graph scheduler."""

from kvdrift.faults.llamacpp.corpus import corpus_for
from kvdrift.faults.llamacpp.model import Grounds, LlamaFault, LlamaTwin, survey
from kvdrift.faults.llamacpp.twins import clean_twins

__all__ = ["Grounds", "LlamaFault", "LlamaTwin", "clean_twins", "corpus_for", "survey"]
