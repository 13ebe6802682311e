"""Planted faults with known true addresses, and clean twins: the proof that a detector can fire, and can be quiet."""

from kvdrift.faults.corpus import corpus_for
from kvdrift.faults.model import CleanTwin, Commits, Fault
from kvdrift.faults.size import measured
from kvdrift.faults.twins import clean_twins

__all__ = ["CleanTwin", "Commits", "Fault", "clean_twins", "corpus_for", "measured"]
