"""Two engines, or two directories of their traces: where they part, and which of them is off."""
