"""GGUF files of tiny random models, one for each shape of graph: softcap, window, sinks, experts, fused weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

from kvdrift.errors import UsageError

VOCAB, EMBD, HEADS, KV_HEADS, DIM, FF, EXPERTS = 96, 64, 4, 2, 32, 96, 4
# Widths of MLA: of the latent row that keys and values share, and of the part that is rotated.
LATENT, ROTATED = 32, 32
ARCHITECTURES = (
    "llama",
    "mixtral",
    "qwen3",
    "gemma2",
    "gpt-oss",
    "phi3",
    "gpt2",
    "bloom",
    "deepseek2",
    "hunyuan-dense",
    "smollm3",
)
_UNROTATED = ("gpt2", "bloom")
_NAMES = {"mixtral": "llama"}  # general.architecture where it is another one
# The pieces of a tokenizer of ASCII bytes, with their kinds. Parts of longer characters are left out: llama-server
# gives no logprobs for them.
_BYTES = {
    b"<unk>": TokenType.UNKNOWN,
    b"<s>": TokenType.CONTROL,
    b"</s>": TokenType.CONTROL,
    **{f"<0x{i:02X}>".encode(): TokenType.BYTE for i in range(128)},
}


def write_tiny_gguf(
    path: Path,
    kind: str,
    *,
    n_layers: int = 2,
    n_positions: int = 128,
    head_width: int = DIM,
    reads_text: bool = False,
    weights: str = "F32",
    window: int = 6,
) -> Path:
    """Write a model of `kind`, with the same weights each time, and return its path.

    `weights` is the type of its matrices: F32, Q8_0, Q4_1 and what else numpy can make of them. With `reads_text` it
    has a tokenizer of bytes, which llama.cpp's server does not start without, and the vocabulary for it. `window` is
    that of models with a sliding one.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in ARCHITECTURES:
        raise UsageError(f"there is no tiny GGUF model {kind!r}; known: {', '.join(ARCHITECTURES)}")
    arch = _NAMES.get(kind, kind)
    writer = GGUFWriter(path, arch)
    writer.add_file_type(LlamaFileType.ALL_F32 if weights == "F32" else LlamaFileType[f"MOSTLY_{weights}"])
    vocabulary = len(_BYTES) if reads_text else VOCAB
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(n_positions)
    writer.add_embedding_length(EMBD)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS if kind in _UNROTATED else 1 if kind == "deepseek2" else KV_HEADS)
    dim = EMBD // HEADS if kind in ("phi3", *_UNROTATED) else head_width
    if kind in _UNROTATED:
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(ROTATED if kind == "deepseek2" else dim)
    writer.add_key_length(LATENT + ROTATED if kind == "deepseek2" else dim)
    writer.add_value_length(LATENT if kind == "deepseek2" else dim)
    _add_tokenizer(writer, reads_text)
    _add_specialities(writer, kind, n_layers, window)
    random = np.random.default_rng(7)
    for name, shape in _tensors(kind, dim, n_layers, n_positions, vocabulary):
        values = random.normal(0.0, 0.2, shape)
        values = (
            1.0 + values if name.endswith("norm.weight") else values * (5.0 if name == "token_embd.weight" else 1.0)
        )
        _add_tensor(writer, name, values.astype(np.float32), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_specialities(writer: GGUFWriter, kind: str, n_layers: int, window: int) -> None:
    if kind in ("mixtral", "gpt-oss"):
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(FF)
    if kind in ("gemma2", "gpt-oss"):
        writer.add_sliding_window(window)
    if kind == "deepseek2":
        writer.add_q_lora_rank(LATENT)
        writer.add_kv_lora_rank(LATENT)
        writer.add_key_length_mla(DIM + ROTATED)
        writer.add_value_length_mla(DIM)
        writer.add_leading_dense_block_count(n_layers)
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(FF)
        writer.add_expert_shared_count(1)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(5.0)
        writer.add_final_logit_softcapping(30.0)


def _add_tensor(writer: GGUFWriter, name: str, tensor: NDArray[np.float32], weights: str) -> None:
    if weights == "F32" or tensor.ndim < 2:
        writer.add_tensor(name, tensor)
    else:
        kept = GGMLQuantizationType[weights]
        writer.add_tensor(name, quantize(tensor, kept), raw_dtype=kept)


def _add_tokenizer(writer: GGUFWriter, reads_text: bool) -> None:
    if not reads_text:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(_BYTES))
    writer.add_token_scores([0.0] * len(_BYTES))
    writer.add_token_types(list(_BYTES.values()))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(
    kind: str, dim: int, n_layers: int, n_positions: int, vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (vocabulary, EMBD)
    yield "output_norm.weight", (EMBD,)
    if kind == "gpt2":
        yield "position_embd.weight", (n_positions, EMBD)
    if kind == "bloom":
        yield "token_embd_norm.weight", (EMBD,)
        yield "token_embd_norm.bias", (EMBD,)
    if kind in _UNROTATED:
        yield "output_norm.bias", (EMBD,)
    if kind != "gemma2":
        yield "output.weight", (vocabulary, EMBD)
    for layer in range(n_layers):
        for name, shape in _unrotated_tensors() if kind in _UNROTATED else _layer_tensors(kind, dim):
            yield f"blk.{layer}.{name}", shape


def _latent_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Attention by latent rows: queries are multiplied down to them, and what they give up to values behind it."""
    yield "attn_q_a.weight", (LATENT, EMBD)
    yield "attn_q_a_norm.weight", (LATENT,)
    yield "attn_q_b.weight", (HEADS * (DIM + ROTATED), LATENT)
    yield "attn_kv_a_mqa.weight", (LATENT + ROTATED, EMBD)
    yield "attn_kv_a_norm.weight", (LATENT,)
    yield "attn_k_b.weight", (HEADS, LATENT, DIM)
    yield "attn_v_b.weight", (HEADS, DIM, LATENT)


def _unrotated_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """A layer whose norms subtract the mean and whose projections have biases."""
    for name, shape in (
        ("attn_norm", (EMBD,)),
        ("attn_qkv", (3 * EMBD, EMBD)),
        ("attn_output", (EMBD, EMBD)),
        ("ffn_norm", (EMBD,)),
        ("ffn_up", (FF, EMBD)),
        ("ffn_down", (EMBD, FF)),
    ):
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def _layer_tensors(kind: str, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    query, kv = HEADS * dim, KV_HEADS * dim
    yield "attn_norm.weight", (EMBD,)
    if kind == "phi3":
        yield "attn_qkv.weight", (query + 2 * kv, EMBD)
    elif kind == "deepseek2":
        yield from _latent_tensors()
    else:
        yield "attn_q.weight", (query, EMBD)
        yield "attn_k.weight", (kv, EMBD)
        yield "attn_v.weight", (kv, EMBD)
    yield "attn_output.weight", (EMBD, query)
    if kind in ("qwen3", "hunyuan-dense"):
        yield "attn_q_norm.weight", (dim,)
        yield "attn_k_norm.weight", (dim,)
    if kind == "gemma2":
        yield "post_attention_norm.weight", (EMBD,)
        yield "post_ffw_norm.weight", (EMBD,)
    if kind == "gpt-oss":
        yield "post_attention_norm.weight", (EMBD,)
        yield "attn_sinks.weight", (HEADS,)
        yield "attn_output.bias", (EMBD,)
        yield "ffn_gate_inp.bias", (EXPERTS,)
        for name, size in (("gate", FF), ("up", FF), ("down", EMBD)):
            yield f"ffn_{name}_exps.bias", (EXPERTS, size)
    else:
        yield "ffn_norm.weight", (EMBD,)
    if kind in ("mixtral", "gpt-oss"):
        yield "ffn_gate_inp.weight", (EXPERTS, EMBD)
        yield "ffn_gate_exps.weight", (EXPERTS, FF, EMBD)
        yield "ffn_up_exps.weight", (EXPERTS, FF, EMBD)
        yield "ffn_down_exps.weight", (EXPERTS, EMBD, FF)
    elif kind == "phi3":
        yield "ffn_up.weight", (2 * FF, EMBD)
        yield "ffn_down.weight", (EMBD, FF)
    else:
        yield "ffn_gate.weight", (FF, EMBD)
        yield "ffn_up.weight", (FF, EMBD)
        yield "ffn_down.weight", (EMBD, FF)
