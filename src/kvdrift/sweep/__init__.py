"""A matrix of audits: from a spec over its cells to one summary. A cell is one audit with its own run directory."""
