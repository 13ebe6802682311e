"""llama.cpp: cached keys that are moved by llama_memory_seq_add, beside keys that were fed at their new positions."""

import ctypes
import tempfile
from pathlib import Path

import llama_cpp as lib
import numpy as np
from gguf import GGUFWriter, RopeScalingType

VOCAB, WIDTH, HEADS, DIM, INNER = 96, 64, 4, 16, 96
TEXT, BY, NEXT = (3, 9, 17, 22, 41, 7, 60, 12), 5, 33


def write(path, arch, n_layers, *, norms=False, yarn=False):
    """A random model of float32 weights."""
    writer = GGUFWriter(path, arch)
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM)
    writer.add_tokenizer_model("no_vocab")
    if yarn:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(n_layers):
        inner = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_down": (WIDTH, INNER)}
        inner |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        inner |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH))
        inner |= dict.fromkeys(("attn_q_norm", "attn_k_norm") if norms else (), (DIM,))
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in inner.items()}
    random = np.random.default_rng(7)
    for name, shape in shapes.items():
        values = random.normal(1.0 if "norm" in name else 0.0, 1.0 if name == "token_embd" else 0.2, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def feed(context, tokens, first):
    """Feed tokens of sequence 0 from a position on, and return the logits of the last one."""
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + i, 1, 0
        batch.logits[i] = i == len(tokens) - 1
    assert lib.llama_decode(context, batch) == 0
    lib.llama_batch_free(batch)
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (VOCAB,)).astype(np.float64)


def logits(model, *, moved):
    """The logits of the next token, behind keys that were fed at their positions or moved to them."""
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_threads, options.flash_attn_type = 256, 1, 0
    options.type_k = options.type_v = 0  # float32
    context = lib.llama_init_from_model(model, options)
    feed(context, TEXT, 0 if moved else BY)
    if moved:
        memory = lib.llama_get_memory(context)
        assert lib.llama_memory_can_shift(memory)
        lib.llama_memory_seq_add(memory, 0, 0, -1, BY)
    found = feed(context, [NEXT], BY + len(TEXT))
    lib.llama_free(context)
    return found


CASES = {
    "llama": ("llama", 4, {}),
    "smollm3, whose layer 3 has no rotation": ("smollm3", 4, {}),
    "hunyuan-dense of one layer, keys normed behind their rotation": ("hunyuan-dense", 1, {"norms": True}),
    "llama, rotated by YaRN": ("llama", 4, {"yarn": True}),
}
silent = lib.llama_log_callback(lambda level, text, data: None)
lib.llama_log_set(silent, ctypes.c_void_p(0))
lib.llama_backend_init()
with tempfile.TemporaryDirectory() as folder:
    for i, (text, (arch, n_layers, options)) in enumerate(CASES.items()):
        path = Path(folder) / f"{i}.gguf"
        write(path, arch, n_layers, **options)
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        fed, moved = logits(model, moved=False), logits(model, moved=True)
        print(f"{text}: logits differ by {np.linalg.norm(moved - fed) / np.linalg.norm(fed):.1e}")
        lib.llama_model_free(model)
