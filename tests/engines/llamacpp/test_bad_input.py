"""A file that is not a model, options that do not fit, a library that is missing: one message, nothing on stderr."""

import sys
from pathlib import Path

import pytest

from kvdrift.engines.llamacpp import library
from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.errors import CaptureError, EngineUnavailable, UsageError
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf
from tests.support.command import kvdrift, refused, write_prompts
from tests.support.gguf import demo_gguf


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    refused(
        kvdrift("audit", f"llamacpp:{path}", "--out", tmp_path / "run"),
        3,
        f"there is no model at {path}; check the path",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_directory(tmp_path: Path) -> None:
    refused(
        kvdrift("audit", f"llamacpp:{tmp_path}"),
        2,
        f"{tmp_path} is a directory; name a .gguf file: kvdrift audit llamacpp:FILE.gguf",
    )


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    refused(
        kvdrift("audit", f"llamacpp:{path}"),
        2,
        f"{path} is not a GGUF file (it begins with b'PK\\x03\\x04' instead of b'GGUF')",
    )


@pytest.mark.parametrize("kept", [4, 24, 100_000, 50_000_000])
def test_a_truncated_file(tmp_path: Path, kept: int, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.gguf"
    with demo_gguf().open("rb") as file:
        path.write_bytes(file.read(kept))
    with pytest.raises(EngineUnavailable, match=r"llama.cpp cannot load .*short.gguf: \w+"), LlamaCppEngine(path):
        pass
    assert capfd.readouterr().err == ""


def test_a_working_model_says_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaCppEngine(demo_gguf(), threads=1) as engine:
        sequence = engine.new_sequence(8)
        sequence.extend((1, 2))
        sequence.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_type": "q9"}, "unknown cache type 'q9'; use --kv-type with one of f32, f16, bf16, q8_0"),
        ({"kv_type": "q8_0"}, "keeps V in q8_0 only with flash attention; add --flash-attn on"),
        ({"n_batch": 0}, "n_batch is 0 and threads None; both must be at least 1"),
        ({"threads": -1}, "threads -1; both must be at least 1"),
        ({"layers": (30,)}, "--layers names layer 30, and SmolLM2-135M-Instruct.Q4_1.gguf has layers 0 to 29"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message), LlamaCppEngine(demo_gguf(), **options):  # type: ignore[arg-type]
        pass


def test_a_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    with LlamaCppEngine(demo_gguf(), threads=1) as engine:
        sequence = engine.new_sequence(8)
        with pytest.raises(CaptureError, match=r"llama_decode of 1 tokens at position 0 returned -1: .*invalid token"):
            sequence.extend((10**6,))
        sequence.close()


def test_options_of_the_other_engine_are_refused(tmp_path: Path) -> None:
    model = f"llamacpp:{demo_gguf()}"
    refused(
        kvdrift("audit", model, "--dtype", "bf16"), 2, f"--dtype is for models in torch, and {model} runs in llama.cpp"
    )
    refused(kvdrift("audit", "--kv-type", "f16"), 2, "--kv-type is for llama.cpp; name the model as llamacpp:FILE.gguf")
    refused(kvdrift("audit", model, "--flash-attn", "yes"), 2, "--flash-attn is 'yes'; use on or off")
    refused(kvdrift("audit", "llamacpp:"), 2, "llamacpp: names no file; write llamacpp:FILE.gguf")


def test_a_file_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    """Asked to tokenize without a vocabulary, llama.cpp would end the process."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    done = kvdrift("audit", f"llamacpp:{path}", "--prompt", "some text", "--out", tmp_path / "run")
    assert done.code == 2
    assert "token" in done.err
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"p": [5, 9, 17]})
    options = ("--span", "1", "--threads", "1", "--out", tmp_path / "run")
    done = kvdrift("audit", f"llamacpp:{path}", "--prompts", prompts, *options)
    assert done.code == 0, done.err


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = kvdrift("audit", f"llamacpp:{demo_gguf()}")
    assert done.code == 3
    assert done.err.startswith("kvdrift: auditing llama.cpp needs 'llama_cpp'; pip install 'kvdrift[llamacpp]'")


def test_a_tensor_that_is_laid_out_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml = library.load_library().ggml
    monkeypatch.setattr(ggml, "_checked", False)
    monkeypatch.setattr(type(ggml), "row_size", lambda self, kind, n: 4)
    monkeypatch.setattr(ggml.library, "ggml_nbytes", lambda address: 1)
    with (
        pytest.raises(EngineUnavailable, match="lays out ggml_tensor in a way that kvdrift does not know"),
        LlamaCppEngine(demo_gguf(), threads=1),
    ):
        pass
