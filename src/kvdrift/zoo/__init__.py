"""Every architecture that an engine knows, as a tiny random model, audited on every route."""
