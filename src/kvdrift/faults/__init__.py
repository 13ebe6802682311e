"""Planted faults with known true addresses: the proof that a detector can fire."""

from kvdrift.faults.corpus import corpus_for
from kvdrift.faults.model import Fault

__all__ = ["Fault", "corpus_for"]
