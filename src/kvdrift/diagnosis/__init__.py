"""From a first failing address to its cause: explanations that are tried on the captured values."""
