"""Scenarios: routes to a token other than plain decode, each of which must give the values of a plain full prefill."""
