"""GRETA StageTrace files."""
