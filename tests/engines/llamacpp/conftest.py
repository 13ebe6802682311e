"""What the tests of llama.cpp share: the file, opened once, and its clean configurations, written once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from tests.support.gguf import demo_gguf


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the file lies at float16 and float32, after the first audit of the session."""
    return tmp_path_factory.mktemp("clean-configurations")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LlamaCppEngine]:
    """The file as it is shipped, K and V in float16, without flash attention."""
    with LlamaCppEngine(demo_gguf(), folder=folder, threads=1) as engine:
        yield engine
