"""Engine for PyTorch models of the transformers library."""
