"""A model of torch, whoever wrote it: its precision, its attention and its modules, watched."""
