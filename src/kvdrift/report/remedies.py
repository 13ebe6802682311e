"""What to do about a cause that was named: where in an engine it is made, and how to see that it is gone."""

from __future__ import annotations

_BY_CAUSES: dict[tuple[str, ...], str] = {
    ("rope_position_offset", "rope_position_offset_q", "rope_position_offset_k"): (
        "Print the position ids of the first decode step: they must begin at the number of tokens in the cache "
        "(for padded rows, of real tokens; with multimodal or rotated prefixes, plus the delta that prefill "
        "used)."
    ),
    ("rope_missing_on_k", "rope_missing_on_q", "rope_twice_on_k", "rope_rows_lost"): (
        "Rotate each query and each key once. Decide whether the cache holds keys before or after rotation, and "
        "follow one key from its projection to the place where attention reads it."
    ),
    ("rope_base", "rope_scaling", "rope_attention_factor", "rope_angles"): (
        "Both routes must take their tables from one place: compare base, scaling type, factors and attention "
        "factor of the decode path with those of prefill, and drop the cache when a schedule changes with the "
        "length."
    ),
    ("rope_interleaved", "rope_partial_dims", "rope_pair_lost"): (
        "Check which dimensions the decode kernel turns together (halves or neighbours), how many of them, and "
        "that its last tile covers the head."
    ),
    ("rope_tables_rounded", "rope_frequencies_rounded", "rope_positions_rounded"): (
        "Keep positions, inverse frequencies and angles in float32 until the cosine is taken; half-precision "
        "numbers cannot hold positions above 256 (bf16) or 2048 (fp16)."
    ),
    ("key_lost_last", "kv_len_frozen"): (
        "The length that the kernel is given must count the token of this step: write K and V first, then attend "
        "over length + 1, and update the length in captured graphs too."
    ),
    ("key_lost_first", "key_lost_middle", "key_tile_lost", "history_lost"): (
        "Compare the mask and the lengths that the decode call gets with those of prefill; look for a tile that "
        "is skipped, a slice that starts at 1, and padding that is guessed from token values."
    ),
    ("mask_top_left",): (
        "Align the causal mask to the bottom right when there are fewer queries than keys; with one query none is"
        " needed."
    ),
    ("mask_leak",): (
        "With several queries on a filled cache, each may see the keys up to its own position only: build the "
        "mask from absolute positions."
    ),
    ("not_causal",): (
        "Prefill itself sees tokens that come later, so there is no decode that could agree with it: pass a "
        "causal mask (encoder classes need is_decoder=True)."
    ),
    ("window_off_by_one", "window_too_short", "window_too_long"): (
        "Agree on what a window of W means: the token itself and W - 1 before it. Mask of prefill, eviction of "
        "the cache and bounds of the decode kernel must all say so."
    ),
    ("window_wrong_layer",): (
        "Take window and cache geometry from the layer, not from the model or from the group that its cache is in."
    ),
    ("unwritten_slots_read",): (
        "Bound the keys by the length and not by the size of the buffer or page; slots behind it may hold anything."
    ),
    ("slot_stale", "slot_half_stale", "prefix_stale", "rewind_residue"): (
        "A row is read that was not written for this token: check slot mapping and block table, the order of copy"
        " and kernel streams, and what reset, rewind and prefix reuse leave behind."
    ),
    ("slot_aliased", "slot_shifted", "slots_shifted", "slots_swapped", "blocks_permuted", "keys_shifted"): (
        "Two tokens share a slot, or slots are counted from another place: compare the slot mapping of writes "
        "with the block table of reads, chunk offsets and ring order included."
    ),
    ("slot_zero", "slot_zeroed", "zeroed"): (
        "A row was never written: check the first and the last token of each chunk, and whether the length moves "
        "before the write."
    ),
    ("rewind_overshoot",): ("Count what a rewind drops: it took more rows than it was asked for."),
    ("batch_row_wrong",): (
        "Rows of the batch are mixed up: check batch strides, views that are not narrowed to the batch, "
        "reordering of beams, and that K and V are reordered together in every layer."
    ),
    ("kv_of_other_layer",): (
        "Check the layer index with which the cache is addressed, and the map of layers that share one."
    ),
    ("k_read_as_v", "v_read_as_k", "k_v_swapped"): (
        "K and V buffers are exchanged: check the order of arguments and offsets."
    ),
    ("heads_tiled", "group_size_wrong", "head_group_wrong", "kv_heads_permuted"): (
        "Query head h reads kv head h // (heads / kv heads): the decode kernel must repeat each kv head, not tile"
        " them, with the group size of this model."
    ),
    ("q_layout", "k_transposed", "v_transposed", "v_permuted", "context_heads_permuted", "k_tail_dims_lost"): (
        "Check shapes and strides at the border of the decode kernel: a view was read in another order, or not to"
        " its end."
    ),
    ("qkv_split_wrong",): ("Check where the fused projection is cut into queries, keys and values on the decode path."),
    ("score_scale", "score_scale_head"): (
        "Use one softmax scale in both kernels, with its mscale or temperature, and apply it once; compare the "
        "constant bit for bit."
    ),
    ("softcap_missing", "softcap_wrong", "logit_softcap_missing"): (
        "Pass the softcap to the decode kernel as well, applied after the scale and before the mask."
    ),
    ("sink_missing", "sink_doubled"): (
        "The attention sink must enter the softmax once: check the merge of splits and chunks."
    ),
    ("alibi_missing", "alibi_scaled", "alibi_slopes", "alibi_wrong"): (
        "Build the position bias over the keys, not over the queries of this call, and add it after the scale."
    ),
    ("chunk_merge", "ghost_chunk"): (
        "Merge partial results with their log-sum-exp (same base, same maximum), and leave empty splits out."
    ),
    ("v_scale", "k_scale_lost"): (
        "Apply the scale of quantised keys and values once, on write and read alike, and for rows of both routes."
    ),
    ("kv_rounded_bf16", "kv_rounded_fp16", "kv_rounded_fp8", "kv_rounded_int4", "kv_truncated", "kv_codes_cut"): (
        "The cache keeps fewer bits than prefill computes with. If that is meant, let prefill attend to the "
        "stored rows as well; if not, store the model's dtype, and round to nearest."
    ),
    ("quantised_scale_wrong", "quantised_zero_point_lost", "quantised_axis_wrong", "quantised_too_coarsely"): (
        "Follow one group of the quantised cache from the row that is written to the row that is read: its scale and "
        "zero point, the axis along which groups are cut, and the number of bits must be the same on both sides."
    ),
    ("kv_bits_reinterpreted",): ("Bytes are read as another dtype: convert the stored rows instead of viewing them."),
    ("softmax_dtype", "scores_dtype", "matmul_dtype", "norm_dtype", "residual_dtype", "router_dtype"): (
        "Accumulate in the same dtype on both routes; the decode path computes this step in a narrower one."
    ),
    ("norm_epsilon", "norm_weight_offset", "q_norm_missing", "k_norm_missing", "final_norm_missing"): (
        "Take the norm of the decode path from the same module or constants: epsilon, weight convention (w or 1 +"
        " w), and whether it runs at all."
    ),
    ("projection_bias_missing", "constant_offset"): (
        "A vector is missing or added on the decode path: check biases and adapters."
    ),
    ("embedding_scale", "logit_scale", "scaled"): (
        "A tensor differs by a factor: look for a scale that one route applies and the other does not."
    ),
    ("expert_missing", "expert_weights"): (
        "Check dispatch for a single token: number of experts, their weights, and whether these are normalised."
    ),
    ("activation_approximated", "operation_skipped"): (
        "The decode path computes another function here: compare its kernel line by line."
    ),
    ("conv_state_post_conv", "conv_state_stale"): (
        "Keep the inputs of the convolution, not its outputs, the last ones, oldest first."
    ),
    ("ssm_state_stale", "ssm_state_scale", "ssm_state_rounded", "ssm_state_transposed"): (
        "Check which token the recurrent state belongs to, its layout and its dtype, and that a call of several "
        "tokens starts from it."
    ),
    ("wrong_choice",): (
        "Look at what lies between logits and token: processors that were not asked for, the bookkeeping of beams, "
        "which drafts are accepted."
    ),
    ("value_of_other_position",): (
        "The decode path works on the row of another token: check gather indices and offsets."
    ),
}

_BY_CAUSE = {cause: text for causes, text in _BY_CAUSES.items() for cause in causes}


def remedy(cause: str) -> str | None:
    """Return what to do about a cause of the catalogue, None for "unexplained" and other words."""
    return _BY_CAUSE.get(cause)
