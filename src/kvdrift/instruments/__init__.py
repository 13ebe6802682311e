"""Independent ways to test drift against noise; each yields evidence."""
