"""A MODEL that is not to be had, or is no model for an audit: one message, exit code 3, nothing written."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kvdrift.engines.hf.load import reject_encoder, why_no_hub
from tests.support.command import SMALL, Result, kvdrift, names, refused, save
from tests.support.tiny import tiny_model

MUST_BE_A_MODEL = (
    "it must return (model, tokenizer), tokenizer may be None. What is no transformers model can be audited too; wrap "
    "it: docs/engines/own.md"
)
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(autouse=True)
def empty(here: Path) -> Any:
    """Whatever a test asks for, the working directory is empty afterwards."""
    yield
    assert names(here) <= {"mine.py", "__pycache__"}


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that knows no names, whatever the one of this machine does."""

    def fail(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", fail)
    for name in ("http_proxy", "https_proxy", "all_proxy", "hf_endpoint", "hf_hub_offline", "transformers_offline"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("path", ["/no/such/model", "./nope", "a/b/c", "/no/x.gguf", "x.gguf"])
def test_a_path_with_nothing_at_it(path: str) -> None:
    refused(kvdrift("audit", path), 3, f"there is no model at {path}; check the path")


def test_an_empty_name() -> None:
    refused(
        kvdrift("audit", ""), 2, "MODEL is empty; name a model directory, a hub id or a .gguf file, or leave it out"
    )


@pytest.mark.usefixtures("unreachable")
def test_a_hub_id_without_network_fails_at_once() -> None:
    began = time.monotonic()

    done = kvdrift("audit", "somebody/some-model-0.5B")

    assert time.monotonic() - began < 60.0, "it waited for a network"
    refused(
        done,
        3,
        "cannot load the model 'somebody/some-model-0.5B': it is not a directory here, huggingface.co cannot be "
        "reached (Name or service not known), and no earlier download is in the cache. Check the name, connect to the "
        "network, or name a local directory.",
    )


@pytest.mark.usefixtures("unreachable")
def test_only_a_closed_network_is_called_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_hub() == "huggingface.co cannot be reached (Name or service not known)"

    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    assert why_no_hub() is None
    monkeypatch.delenv("https_proxy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert why_no_hub() == "HF_HUB_OFFLINE is set"

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.undo()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setattr("kvdrift.engines.hf.load.getproxies", dict)
        assert why_no_hub() is None


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_text("x")

    refused(
        kvdrift("audit", path),
        2,
        f"{path} is a file, and not a .gguf file; name a model directory, a hub id or a .gguf file",
    )


def test_a_gguf_file_of_garbage(tmp_path: Path) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes(b"not a gguf" * 10)

    done = kvdrift("audit", path)

    assert done.err.startswith(f"kvdrift: cannot load the model '{path}': ")
    assert done.err.endswith(f"; to audit it as llama.cpp runs it: kvdrift audit llamacpp:{path}\n")
    assert_one_message(done, 3)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    refused(
        kvdrift("audit", tmp_path),
        3,
        f"the directory {tmp_path} has no config.json, so it holds no transformers model; name the directory that "
        "save_pretrained wrote, or, for a model of your own, wrap it: docs/engines/own.md",
    )


@pytest.mark.parametrize("config", ["{nope", '{"model_type": "zzz"}', "[]", '{"model_type": "llama"}'])
def test_a_directory_whose_config_is_damaged(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)

    done = kvdrift("audit", tmp_path)

    assert done.err.startswith(f"kvdrift: cannot load the model '{tmp_path}': ")
    assert_one_message(done, 3)


def test_weights_that_are_truncated(tmp_path: Path, llama: Path) -> None:
    copied(llama, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])

    done = kvdrift("audit", tmp_path)

    assert done.err.startswith(f"kvdrift: cannot load the model '{tmp_path}': ")
    assert_one_message(done, 3)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, llama: Path) -> None:
    """The library fills them with random numbers, and the audit of those would pass."""
    copied(llama, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    refused(
        kvdrift("audit", tmp_path),
        3,
        f"the checkpoint of {tmp_path} lacks 1 weights of a LlamaForCausalLM, such as "
        "model.layers.1.mlp.up_proj.weight; they would be random. Check that the checkpoint is whole, and that it is "
        "one of a causal language model.",
    )


@pytest.mark.parametrize("kind", [BertModel, BertLMHeadModel])
def test_an_encoder_that_the_library_would_load_as_a_language_model(tmp_path: Path, kind: Any) -> None:
    save(kind(BertConfig(**BERT)), tmp_path / "bert")

    refused(
        kvdrift("audit", tmp_path / "bert"),
        3,
        "bert (BertLMHeadModel) is encoder-only: its attention is bidirectional, so it has no decode step on a cache "
        "to audit. Use a decoder-only language model.",
    )


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("distilbert", lambda: DistilBertModel(DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=2))),
        ("t5", lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1))),
    ],
)
def test_a_model_that_is_no_decoder(tmp_path: Path, name: str, model: Any) -> None:
    save(model(), tmp_path / name)

    refused(
        kvdrift("audit", tmp_path / name),
        3,
        f"{name} is a {name} model, which transformers does not offer as a causal language model; kvdrift audits "
        "decoder-only language models.",
    )


def test_a_decoder_is_not_taken_for_an_encoder() -> None:
    """GPT-NeoX says is_decoder=False in its config, and is one."""
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**BERT))
    assert model.config.is_decoder is False

    reject_encoder(model, "gpt_neox")
    reject_encoder(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), "bert as a decoder")


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    config = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    save(OpenAIGPTLMHeadModel(config), tmp_path / "gpt")

    refused(
        kvdrift("audit", tmp_path / "gpt"),
        3,
        "OpenAIGPTLMHeadModel left the cache empty after a forward call, so it has no decode step on a cache to audit. "
        "Use a decoder-only model that supports past_key_values.",
    )


def test_weights_that_are_not_finite(tmp_path: Path, prompts: Path) -> None:
    model = tiny_model("llama", **SMALL)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    save(model, tmp_path / "nan")

    refused(
        kvdrift("audit", tmp_path / "nan", "--prompts", prompts),
        4,
        "1 of 1024 weights of model.layers.1.mlp.up_proj.weight are NaN or infinite; every pass would be too. Check "
        "the checkpoint and the dtype that it was converted to.",
    )


# ------------------------------------------------------------------------------------------- package.module:function


def mine(here: Path, code: str) -> None:
    (here / "mine.py").write_text(code)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a module of this name of its own."""
    import sys

    monkeypatch.delitem(sys.modules, "mine", raising=False)


def test_a_module_that_is_not_there() -> None:
    refused(
        kvdrift("audit", "mine:load"),
        3,
        "cannot import 'mine' of 'mine:load': No module named 'mine'; run in the folder that holds it, or set "
        "PYTHONPATH",
    )


def test_a_function_that_is_not_there(here: Path) -> None:
    mine(here, "")

    refused(kvdrift("audit", "mine:load"), 3, "'mine' has no function 'load'; check MODEL 'mine:load'")


def test_a_module_that_fails(here: Path) -> None:
    mine(here, "x = 1\nraise RuntimeError('at import')\n")

    refused(
        kvdrift("audit", "mine:load"),
        3,
        f"importing 'mine' of 'mine:load' failed: RuntimeError: at import ({here / 'mine.py'}:2)",
    )


def test_a_function_that_raises(here: Path) -> None:
    mine(here, "def load():\n    raise LookupError('no weights\\n  today')\n")

    refused(
        kvdrift("audit", "mine:load"),
        3,
        f"mine:load failed: LookupError: no weights today ({here / 'mine.py'}:2); it is called without arguments",
    )


def test_a_function_that_leaves(here: Path) -> None:
    mine(here, "def load():\n    raise SystemExit(0)\n")

    assert kvdrift("audit", "mine:load").code == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5", f"mine:load returned int; {MUST_BE_A_MODEL}"),
        ("None", f"mine:load returned NoneType; {MUST_BE_A_MODEL}"),
        ("(1, 2)", f"mine:load returned int; {MUST_BE_A_MODEL}"),
        (
            "(__import__('torch').nn.Linear(2, 2), 5)",
            "mine:load returned int as the tokenizer, which has no method encode; return None if there is none",
        ),
    ],
)
def test_a_function_that_returns_something_else(here: Path, value: str, message: str) -> None:
    mine(here, f"def load():\n    return {value}\n")

    refused(kvdrift("audit", "mine:load"), 2, message)


def test_a_name_that_is_no_function(here: Path) -> None:
    mine(here, "load = 5\n")

    refused(
        kvdrift("audit", "mine:load"),
        2,
        "mine:load is of type int; it must be a function that returns (model, tokenizer)",
    )


def test_a_module_that_is_no_transformers_model(here: Path) -> None:
    mine(here, "import torch\ndef load():\n    return torch.nn.Linear(2, 2), None\n")

    refused(
        kvdrift("audit", "mine:load"),
        3,
        "Linear has no config, so it is no transformers model; wrap it: docs/engines/own.md (a kvdrift.TorchEngine "
        "takes any model of torch that decodes with a cache)",
    )


FAILING = """
from tests.support.command import SMALL
from tests.support.tiny import tiny_model

class Broken(Exception):
    pass

def at_once():
    return failing(0)

def at_decode():
    return failing(3)

def failing(after):
    model = tiny_model("llama", **SMALL)
    def hook(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        if cache.get_seq_length() == after:
            raise Broken("a bug of mine\\nwith a second line")
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    return model, None
"""


@pytest.mark.parametrize("when", ["at_once", "at_decode"])
def test_a_model_that_raises_in_its_forward(here: Path, prompts: Path, when: str) -> None:
    mine(here, FAILING)

    done = kvdrift("audit", f"mine:{when}", "--prompts", prompts)

    assert "a bug of mine" in done.err
    assert "second line" not in done.err
    assert_one_message(done, 4)


def assert_one_message(done: Result, code: int) -> None:
    assert done.code == code
    assert done.out == ""
    assert done.err.startswith("kvdrift: ")
    assert done.err.count("\n") == 1


def copied(model: Path, folder: Path) -> None:
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
