"""What was measured of a run: pairs go in, tables come out."""
