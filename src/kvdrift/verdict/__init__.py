"""From evidence to a verdict: deciding and localising."""
