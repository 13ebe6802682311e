"""Other tools' rules, applied to the same tensors."""
