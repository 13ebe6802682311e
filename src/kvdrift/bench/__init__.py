"""How good the verdicts are: the fault corpus run through kvdrift and, on the same tensors, through every peer's rule."""
