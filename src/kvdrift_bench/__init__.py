"""How good the verdicts are: the corpus through kvdrift and, on the same tensors, through every peer's rule."""
