"""llama.cpp as an engine, through the low-level API of llama-cpp-python and the callback of its graph scheduler."""
