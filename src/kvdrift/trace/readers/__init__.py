"""Readers of the trace files of other programs. None of them unpickles, and none reads outside the directory given."""
