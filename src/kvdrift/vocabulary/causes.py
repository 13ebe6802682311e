"""The catalogue of causes: every name that a diagnosis can give, where it gives it, and what to do about it.

docs/adding/cause.md shows how a cause is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from kvdrift.vocabulary.sites import CACHE_SITES, STATE_SITES, Site

# Groups of sites at which one explanation is tried.
_TURNED = (Site.Q_ROPE, Site.K_ROPE)
_KEY_TURN = (Site.K_ROPE, Site.K_CACHE)
_ROWS = (*CACHE_SITES,)
_ATTENDED = (Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX)
_WEIGHED = (Site.ATTN_SCORES, Site.ATTN_PROBS)
_NORMED = (Site.ATTN_NORM_OUT, Site.FFN_NORM_OUT, Site.FINAL_NORM_OUT)
_BIASED = (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT)
_EXPERTS = (Site.ROUTER, Site.MLP_OUT)
_MIXED = (*_TURNED, *CACHE_SITES, Site.ATTN_CTX, *STATE_SITES, Site.LAYER_OUT)
_PRODUCTS = (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.MLP_OUT)

# Remedies that several causes share.
_POSITION_IDS = (
    "Print the position ids of the first decode step: they must begin at the number of tokens in the cache (for "
    "padded rows, of real tokens; with multimodal or rotated prefixes, plus the delta that prefill used)."
)
_ROTATE_ONCE = (
    "Rotate each query and each key once. Decide whether the cache holds keys before or after rotation, and follow "
    "one key from its projection to the place where attention reads it."
)
_ONE_TABLE = (
    "Both routes must take their tables from one place: compare base, scaling type, factors and attention factor of "
    "the decode path with those of prefill, and drop the cache when a schedule changes with the length."
)
_PAIRS = (
    "Check which dimensions the decode kernel turns together (halves or neighbours), how many of them, and that its "
    "last tile covers the head."
)
_MATRIX = (
    "Each pair (x, y) becomes (x cos - y sin, x sin + y cos): check the signs, that both are computed from the values "
    "before the rotation, and which elements are paired."
)
_FLOAT32_ANGLES = (
    "Keep positions, inverse frequencies and angles in float32 until the cosine is taken; half-precision numbers "
    "cannot hold positions above 256 (bf16) or 2048 (fp16)."
)
_OWN_TOKEN = (
    "The length that the kernel is given must count the token of this step: write K and V first, then attend over "
    "length + 1, and update the length in captured graphs too."
)
_MASK_AND_LENGTH = (
    "Compare the mask and the lengths that the decode call gets with those of prefill; look for a tile that is "
    "skipped, a slice that starts at 1, and padding that is guessed from token values."
)
_WINDOW = (
    "Agree on what a window of W means: the token itself and W - 1 before it. Mask of prefill, eviction of the cache "
    "and bounds of the decode kernel must all say so."
)
_NOT_WRITTEN_FOR_THIS = (
    "A row is read that was not written for this token: check slot mapping and block table, the order of copy and "
    "kernel streams, and what reset, rewind and prefix reuse leave behind."
)
_SLOT_MAPPING = (
    "Two tokens share a slot, or slots are counted from another place: compare the slot mapping of writes with the "
    "block table of reads, chunk offsets and ring order included."
)
_NEVER_WRITTEN = (
    "A row was never written: check the first and the last token of each chunk, and whether the length moves before "
    "the write."
)
_K_AND_V = "K and V buffers are exchanged: check the order of arguments and offsets."
_HEAD_GROUPS = (
    "Query head h reads kv head h // (heads / kv heads): the decode kernel must repeat each kv head, not tile them, "
    "with the group size of this model."
)
_STRIDES = (
    "Check shapes and strides at the border of the decode kernel: a view was read in another order, or not to its end."
)
_ONE_SCALE = (
    "Use one softmax scale in both kernels, with its mscale or temperature, and apply it once; compare the constant "
    "bit for bit."
)
_SOFTCAP = "Pass the softcap to the decode kernel as well, applied after the scale and before the mask."
_SINK = "The attention sink must enter the softmax once: check the merge of splits and chunks."
_SINK_OF_HEAD = (
    "Each head has a sink of its own: check the order in which the decode kernel reads them, and their dtype."
)
_SCORE_BIAS = (
    "A number is added to the scores of some keys: compare the additive mask of the decode call with that of prefill, "
    "value by value; a mask that hides must be minus infinity, or the least number of its dtype."
)
_ALIBI = "Build the position bias over the keys, not over the queries of this call, and add it after the scale."
_MERGE = "Merge partial results with their log-sum-exp (same base, same maximum), and leave empty splits out."
_KV_SCALE = "Apply the scale of quantised keys and values once, on write and read alike, and for rows of both routes."
_FEWER_BITS = (
    "The cache keeps fewer bits than prefill computes with. If that is meant, let prefill attend to the stored rows "
    "as well; if not, store the model's dtype, and round to nearest."
)
_QUANTISED_GROUP = (
    "Follow one group of the quantised cache from the row that is written to the row that is read: its scale and zero"
    " point, the axis along which groups are cut, and the number of bits must be the same on both sides."
)
_ACCUMULATE = "Accumulate in the same dtype on both routes; the decode path computes this step in a narrower one."
_NORM = (
    "Take the norm of the decode path from the same module or constants: epsilon, weight convention (w or 1 + w), and"
    " whether it runs at all."
)
_NORM_SPAN = (
    "Check over which elements the norm of decode takes its mean square: a whole row, one head, or the part that one "
    "device holds."
)
_NORM_INPUT = (
    "The norm of the decode path is given another tensor: compare the order of residual addition and norm with prefill."
)
_RESIDUAL = "The residual stream of the decode path is not the sum of its terms: check that each is added once."
_SOME_HEADS = (
    "Only some heads are wrong: check the grid of the decode kernel (heads in a group, groups in a launch, ranks), and"
    " scales that are kept for each head."
)
_TILE = "Elements are not written: check that the last tile of the decode kernel covers the whole width."
_BLOCK_SCALE = "One block is off by a factor: check scales that are kept for each block, of weights or of stored rows."
_PROCESSOR = "Logits of some tokens were changed: check for penalties, biases and banned tokens on the decode path."
_VECTOR = "A vector is missing or added on the decode path: check biases and adapters."
_FACTOR = "A tensor differs by a factor: look for a scale that one route applies and the other does not."
_DISPATCH = "Check dispatch for a single token: number of experts, their weights, and whether these are normalised."
_SHARED_EXPERT = (
    "Look for what the decode path does with the expert that every token goes to: it is added once, times its own gate "
    "where it has one, and no routing weight or scale of the routed experts applies to it."
)
_OTHER_FUNCTION = "The decode path computes another function here: compare its kernel line by line."
_PRODUCT = (
    "Take the operand of this product out of the decode path and multiply it with the weights as they are loaded: look "
    "for other or stale weights, a scale of one group or tile, terms that are left out, an adapter of one route."
)
_BETWEEN = (
    "The products of this part are right, so compare what the decode path does between and behind them: activation, "
    "gate and its limits, which experts are taken and their weights, tiles of the inner row that are left out."
)
_MIXER = (
    "The projections into this part are right, so compare what the decode path does behind them: norms and rotation, "
    "splits, the rows or the state that its kernel reads, the kernel itself, a gate or a recurrence."
)
_IN_FRONT = (
    "The product is right for the row that goes into it, and what was recorded before agrees: compare what the decode "
    "path does to that row in between (an output gate, a norm, a shift by a token, a factor, the order of heads)."
)
_CONV_STATE = "Keep the inputs of the convolution, not its outputs, the last ones, oldest first."
_SSM_STATE = (
    "Check which token the recurrent state belongs to, its layout and its dtype, and that a call of several tokens "
    "starts from it."
)


class Cause(StrEnum):
    """A cause of the catalogue. The value is its name in `report.json`.

    Attributes:
        sites: where a diagnosis names it, or where a planted fault of this cause shows first. Empty: anywhere.
        remedy: what to do about it, one or two sentences; None for UNEXPLAINED alone.
    """

    sites: frozenset[Site]
    remedy: str | None

    def __new__(cls, value: str, sites: Iterable[Site] = (), remedy: str | None = None) -> Cause:
        """Make a member out of its line: name in reports, sites, remedy."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.sites = frozenset(sites)
        member.remedy = remedy
        return member

    # No cause of the catalogue explains enough.
    UNEXPLAINED = "unexplained"

    # Rotation
    ROPE_POSITION_OFFSET = "rope_position_offset", _TURNED, _POSITION_IDS
    ROPE_POSITION_OFFSET_Q = "rope_position_offset_q", (Site.Q_ROPE,), _POSITION_IDS
    ROPE_POSITION_OFFSET_K = "rope_position_offset_k", _KEY_TURN, _POSITION_IDS
    ROPE_MISSING_ON_Q = "rope_missing_on_q", (Site.Q_ROPE,), _ROTATE_ONCE
    ROPE_MISSING_ON_K = "rope_missing_on_k", _KEY_TURN, _ROTATE_ONCE
    ROPE_TWICE_ON_K = "rope_twice_on_k", _KEY_TURN, _ROTATE_ONCE
    ROPE_ROWS_LOST = "rope_rows_lost", _TURNED, _ROTATE_ONCE
    ROPE_BASE = "rope_base", _TURNED, _ONE_TABLE
    ROPE_SCALING = "rope_scaling", _TURNED, _ONE_TABLE
    ROPE_ATTENTION_FACTOR = "rope_attention_factor", _TURNED, _ONE_TABLE
    ROPE_ANGLES = "rope_angles", _TURNED, _ONE_TABLE
    ROPE_INTERLEAVED = "rope_interleaved", _TURNED, _PAIRS
    ROPE_PARTIAL_DIMS = "rope_partial_dims", _TURNED, _PAIRS
    ROPE_NO_ROTATION = "rope_no_rotation", _TURNED, _MATRIX
    ROPE_PAIR_LOST = "rope_pair_lost", _TURNED, _PAIRS
    ROPE_TABLES_ROUNDED = "rope_tables_rounded", _TURNED, _FLOAT32_ANGLES
    ROPE_FREQUENCIES_ROUNDED = "rope_frequencies_rounded", _TURNED, _FLOAT32_ANGLES
    ROPE_POSITIONS_ROUNDED = "rope_positions_rounded", _TURNED, _FLOAT32_ANGLES

    # Which keys are attended to
    KEY_LOST_FIRST = "key_lost_first", (*_ROWS, *_ATTENDED), _MASK_AND_LENGTH
    KEY_LOST_MIDDLE = "key_lost_middle", (*_ROWS, *_WEIGHED), _MASK_AND_LENGTH
    KEY_LOST_LAST = "key_lost_last", (*_ROWS, *_ATTENDED), _OWN_TOKEN
    KEY_TILE_LOST = "key_tile_lost", _WEIGHED, _MASK_AND_LENGTH
    KV_LEN_FROZEN = "kv_len_frozen", _WEIGHED, _OWN_TOKEN
    HISTORY_LOST = "history_lost", _WEIGHED, _MASK_AND_LENGTH
    MASK_TOP_LEFT = (
        "mask_top_left",
        _WEIGHED,
        "Align the causal mask to the bottom right when there are fewer queries than keys; with one query none is "
        "needed.",
    )
    MASK_LEAK = (
        "mask_leak",
        _WEIGHED,
        "Each query may see the keys of its own text up to its own position, and no padding: build the mask from "
        "absolute positions in decode steps as well, and for each of several queries on a filled cache.",
    )
    NOT_CAUSAL = (
        "not_causal",
        _WEIGHED,
        "Prefill itself sees tokens that come later, so there is no decode that could agree with it: pass a causal "
        "mask (encoder classes need is_decoder=True).",
    )
    WINDOW_OFF_BY_ONE = "window_off_by_one", _WEIGHED, _WINDOW
    WINDOW_TOO_SHORT = "window_too_short", _ATTENDED, _WINDOW
    WINDOW_TOO_LONG = "window_too_long", _ATTENDED, _WINDOW
    WINDOW_WRONG_LAYER = (
        "window_wrong_layer",
        _WEIGHED,
        "Take window and cache geometry from the layer, not from the model or from the group that its cache is in.",
    )
    UNWRITTEN_SLOTS_READ = (
        "unwritten_slots_read",
        _ATTENDED,
        "Bound the keys by the length and not by the size of the buffer or page; slots behind it may hold anything.",
    )

    # Whose row a slot holds
    SLOT_STALE = "slot_stale", _ROWS, _NOT_WRITTEN_FOR_THIS
    SLOT_HALF_STALE = "slot_half_stale", _ROWS, _NOT_WRITTEN_FOR_THIS
    PREFIX_STALE = "prefix_stale", _ROWS, _NOT_WRITTEN_FOR_THIS
    REWIND_RESIDUE = "rewind_residue", (Site.LAYER_IN, *_TURNED, *_ROWS), _NOT_WRITTEN_FOR_THIS
    REWIND_OVERSHOOT = (
        "rewind_overshoot",
        (Site.LAYER_IN, *_TURNED, *_ROWS),
        "Count what a rewind drops: it took more rows than it was asked for.",
    )
    SLOT_ALIASED = "slot_aliased", (*_ROWS, Site.ATTN_SCORES, Site.ATTN_CTX), _SLOT_MAPPING
    SLOT_SHIFTED = "slot_shifted", (*_ROWS, Site.ATTN_CTX), _SLOT_MAPPING
    SLOTS_SHIFTED = "slots_shifted", (Site.K_CACHE,), _SLOT_MAPPING
    SLOTS_SWAPPED = "slots_swapped", (Site.K_CACHE,), _SLOT_MAPPING
    KEYS_SHIFTED = "keys_shifted", (Site.ATTN_SCORES, Site.ATTN_CTX), _SLOT_MAPPING
    BLOCKS_PERMUTED = "blocks_permuted", (), _SLOT_MAPPING
    SLOTS_MERGED = "slots_merged", _ROWS, _SLOT_MAPPING
    ROWS_ADDED = (
        "rows_added",
        _ROWS,
        "A row is added onto what its slot holds, or two rows are written to one: store it instead of accumulating.",
    )
    SLOT_ZERO = "slot_zero", _ROWS, _NEVER_WRITTEN
    SLOT_ZEROED = "slot_zeroed", (*_ROWS, *_WEIGHED), _NEVER_WRITTEN
    ZEROED = "zeroed", (), _NEVER_WRITTEN
    BATCH_ROW_WRONG = (
        "batch_row_wrong",
        (*_ROWS, *_ATTENDED),
        "Rows of the batch are mixed up: check batch strides, views that are not narrowed to the batch, reordering of "
        "beams, and that K and V are reordered together in every layer.",
    )
    KV_OF_OTHER_LAYER = (
        "kv_of_other_layer",
        _ROWS,
        "Check the layer index with which the cache is addressed, and the map of layers that share one.",
    )
    K_READ_AS_V = "k_read_as_v", (Site.V_CACHE, Site.ATTN_CTX), _K_AND_V
    V_READ_AS_K = "v_read_as_k", (Site.K_CACHE,), _K_AND_V
    K_V_SWAPPED = "k_v_swapped", _ROWS, _K_AND_V

    # Heads and layouts
    HEADS_TILED = "heads_tiled", _ATTENDED, _HEAD_GROUPS
    GROUP_SIZE_WRONG = "group_size_wrong", _WEIGHED, _HEAD_GROUPS
    HEAD_GROUP_WRONG = "head_group_wrong", (*_ROWS, *_WEIGHED), _HEAD_GROUPS
    KV_HEADS_PERMUTED = "kv_heads_permuted", _ROWS, _HEAD_GROUPS
    Q_LAYOUT = "q_layout", _WEIGHED, _STRIDES
    Q_HEADS_PERMUTED = "q_heads_permuted", _WEIGHED, _STRIDES
    QUERY_FROZEN = (
        "query_frozen",
        (Site.ATTN_SCORES,),
        "Decode reads its query from a buffer that nobody fills: copy the new query into the static buffers of a graph "
        "before it is replayed.",
    )
    K_TRANSPOSED = "k_transposed", (Site.K_CACHE,), _STRIDES
    V_TRANSPOSED = "v_transposed", (Site.V_CACHE,), _STRIDES
    V_PERMUTED = "v_permuted", (Site.V_CACHE, Site.ATTN_CTX), _STRIDES
    CONTEXT_HEADS_PERMUTED = "context_heads_permuted", (Site.ATTN_OUT, Site.RESID_ATTN), _STRIDES
    DIMS_PERMUTED = "dims_permuted", (), _STRIDES
    K_TAIL_DIMS_LOST = "k_tail_dims_lost", _ROWS, _STRIDES
    QKV_SPLIT_WRONG = (
        "qkv_split_wrong",
        (Site.K_PROJ, Site.V_PROJ),
        "Check where the fused projection is cut into queries, keys and values on the decode path.",
    )

    # Scores and what is merged of them
    SCORE_SCALE = "score_scale", _ATTENDED, _ONE_SCALE
    SCORE_SCALE_HEAD = "score_scale_head", _WEIGHED, _ONE_SCALE
    SOFTCAP_MISSING = "softcap_missing", _ATTENDED, _SOFTCAP
    SOFTCAP_WRONG = "softcap_wrong", _WEIGHED, _SOFTCAP
    SINK_MISSING = "sink_missing", _ATTENDED, _SINK
    SINK_DOUBLED = "sink_doubled", _ATTENDED, _SINK
    SINK_WRONG = "sink_wrong", _WEIGHED, _SINK_OF_HEAD
    SCORE_BIAS = "score_bias", _WEIGHED, _SCORE_BIAS
    ALIBI_MISSING = "alibi_missing", _WEIGHED, _ALIBI
    ALIBI_SCALED = "alibi_scaled", _WEIGHED, _ALIBI
    ALIBI_SLOPES = "alibi_slopes", _WEIGHED, _ALIBI
    ALIBI_WRONG = "alibi_wrong", _WEIGHED, _ALIBI
    WEIGHTS_DROPPED = (
        "weights_dropped",
        (Site.ATTN_CTX,),
        "Keys of little weight are skipped or flushed to zero in decode alone: use the same rule in both passes, with "
        "a threshold below what the dtype rounds, or none.",
    )
    CHUNK_MERGE = "chunk_merge", (Site.ATTN_CTX, Site.ATTN_OUT), _MERGE
    SPLIT_LOST = "split_lost", (Site.ATTN_CTX, Site.ATTN_OUT), _MERGE
    SPLIT_COUNTED_TWICE = "split_counted_twice", (Site.ATTN_CTX, Site.ATTN_OUT), _MERGE
    GHOST_CHUNK = "ghost_chunk", (Site.ATTN_CTX, Site.ATTN_OUT), _MERGE

    # Form in which rows are stored
    V_SCALE = "v_scale", (Site.V_CACHE, Site.ATTN_CTX), _KV_SCALE
    K_SCALE_LOST = "k_scale_lost", _ROWS, _KV_SCALE
    KV_ROUNDED_BF16 = "kv_rounded_bf16", _ROWS, _FEWER_BITS
    KV_ROUNDED_FP16 = "kv_rounded_fp16", _ROWS, _FEWER_BITS
    KV_ROUNDED_FP8 = "kv_rounded_fp8", _ROWS, _FEWER_BITS
    KV_ROUNDED_INT2 = "kv_rounded_int2", _ROWS, _FEWER_BITS
    KV_ROUNDED_INT3 = "kv_rounded_int3", _ROWS, _FEWER_BITS
    KV_ROUNDED_INT4 = "kv_rounded_int4", _ROWS, _FEWER_BITS
    KV_ROUNDED_INT5 = "kv_rounded_int5", _ROWS, _FEWER_BITS
    KV_ROUNDED_INT8 = "kv_rounded_int8", _ROWS, _FEWER_BITS
    KV_TRUNCATED = "kv_truncated", _ROWS, _FEWER_BITS
    KV_CODES_CUT = "kv_codes_cut", _ROWS, _FEWER_BITS
    KV_CODES_UNSIGNED = "kv_codes_unsigned", _ROWS, _QUANTISED_GROUP
    KV_CLIPPED = (
        "kv_clipped",
        _ROWS,
        "Large elements of the rows are cut off: take the scale of the stored rows from what they hold.",
    )
    KEYS_IN_OTHER_BASIS = (
        "keys_in_other_basis",
        _ROWS,
        "Rows are stored under an orthogonal matrix (a Hadamard rotation, a change of basis): turn the query by the "
        "same one, and values back, in every path that reads them.",
    )
    KV_BITS_REINTERPRETED = (
        "kv_bits_reinterpreted",
        _ROWS,
        "Bytes are read as another dtype: convert the stored rows instead of viewing them.",
    )
    VALUES_ROUNDED_FP8 = (
        "values_rounded_fp8",
        (Site.ATTN_CTX,),
        "The kernel rounds values to eight bits under a scale: take it from the rows that it is applied to, not from "
        "those of the step before, and in prefill as in decode.",
    )
    QUANTISED_SCALE_WRONG = "quantised_scale_wrong", _ROWS, _QUANTISED_GROUP
    QUANTISED_ZERO_POINT_LOST = "quantised_zero_point_lost", _ROWS, _QUANTISED_GROUP
    QUANTISED_AXIS_WRONG = "quantised_axis_wrong", _ROWS, _QUANTISED_GROUP
    QUANTISED_TOO_COARSELY = "quantised_too_coarsely", _ROWS, _QUANTISED_GROUP

    # Dtype of a step
    SOFTMAX_DTYPE = "softmax_dtype", _WEIGHED, _ACCUMULATE
    EXP_APPROXIMATED = (
        "exp_approximated",
        (Site.ATTN_CTX,),
        "The powers of softmax are approximated on the decode path alone: use the same function in both passes, or one "
        "that is exact to the dtype.",
    )
    SCORES_DTYPE = "scores_dtype", _WEIGHED, _ACCUMULATE
    MATMUL_DTYPE = "matmul_dtype", (Site.Q_PROJ, Site.Q_ROPE), _ACCUMULATE
    NORM_DTYPE = "norm_dtype", _NORMED, _ACCUMULATE
    RESIDUAL_DTYPE = "residual_dtype", (Site.LAYER_IN, Site.LAYER_OUT), _ACCUMULATE
    ROUTER_DTYPE = "router_dtype", _EXPERTS, _ACCUMULATE
    ROUNDED_TO_BFLOAT16 = "rounded_to_bfloat16", (), _ACCUMULATE
    ROUNDED_TO_FLOAT16 = "rounded_to_float16", (), _ACCUMULATE
    ROUNDED_TO_FLOAT8_E4M3FN = "rounded_to_float8_e4m3fn", (), _ACCUMULATE
    ROUNDED_TO_FLOAT8_E5M2 = "rounded_to_float8_e5m2", (), _ACCUMULATE

    # Norms, projections, experts and what else acts on one token
    NORM_EPSILON = "norm_epsilon", _NORMED, _NORM
    NORM_WEIGHT_OFFSET = "norm_weight_offset", _NORMED, _NORM
    NORM_WEIGHT_WRONG = (
        "norm_weight_wrong",
        (*_NORMED, Site.Q_NORM, Site.K_NORM, Site.RESID_ATTN, Site.LAYER_OUT),
        _NORM,
    )
    NORM_INPUT_WRONG = "norm_input_wrong", _NORMED, _NORM_INPUT
    NORM_CENTRED = "norm_centred", _NORMED, _NORM
    NORM_OVER_PARTS = "norm_over_parts", (*_NORMED, Site.Q_NORM, Site.K_NORM), _NORM_SPAN
    NORM_BEHIND_ROPE = (
        "norm_behind_rope",
        _TURNED,
        "The norm of queries and keys comes before their rotation: its weight belongs to elements not yet turned.",
    )
    Q_NORM_MISSING = "q_norm_missing", (Site.Q_NORM,), _NORM
    K_NORM_MISSING = "k_norm_missing", (Site.K_NORM,), _NORM
    FINAL_NORM_MISSING = "final_norm_missing", (Site.FINAL_NORM_OUT,), _NORM
    PROJECTION_BIAS_MISSING = "projection_bias_missing", _BIASED, _VECTOR
    CONSTANT_OFFSET = (
        "constant_offset",
        (*_NORMED, Site.EMBED_OUT, Site.LAYER_IN, Site.RESID_ATTN, Site.MLP_OUT, Site.LAYER_OUT, Site.LOGITS),
        "A vector is missing or added on the decode path: check biases, adapters, and hooks that steer the stream.",
    )
    EMBEDDING_SCALE = "embedding_scale", (Site.EMBED_OUT,), _FACTOR
    LOGIT_SCALE = "logit_scale", (Site.LOGITS,), _FACTOR
    SCALED = "scaled", (), _FACTOR
    LOGITS_PROCESSED = "logits_processed", (Site.LOGITS,), _PROCESSOR
    LOGIT_SOFTCAP_MISSING = "logit_softcap_missing", (Site.LOGITS,), _SOFTCAP
    EXPERT_MISSING = "expert_missing", _EXPERTS, _DISPATCH
    EXPERT_WEIGHTS = "expert_weights", _EXPERTS, _DISPATCH
    SHARED_EXPERT_MISSING = "shared_expert_missing", (Site.MLP_OUT,), _SHARED_EXPERT
    SHARED_EXPERT_WEIGHT = "shared_expert_weight", (Site.MLP_OUT,), _SHARED_EXPERT
    ACTIVATION_APPROXIMATED = "activation_approximated", (Site.MLP_OUT, Site.LAYER_OUT), _OTHER_FUNCTION
    RESIDUAL_WRONG = "residual_wrong", (Site.RESID_ATTN, Site.LAYER_OUT), _RESIDUAL
    ADAPTER_MISSING = "adapter_missing", _PRODUCTS, _VECTOR
    PRODUCT_WRONG = "product_wrong", (*_PRODUCTS, Site.ROUTER, Site.LOGITS), _PRODUCT
    BETWEEN_PRODUCTS = "between_products", (Site.MLP_OUT,), _BETWEEN
    OPERAND_WRONG = "operand_wrong", (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT), _IN_FRONT
    BETWEEN_PROJECTIONS = "between_projections", _MIXED, _MIXER
    HEADS_SCALED = "heads_scaled", (), _SOME_HEADS
    HEADS_ZERO = "heads_zero", (), _SOME_HEADS
    TILE_ZERO = "tile_zero", (), _TILE
    BLOCK_SCALED = "block_scaled", (), _BLOCK_SCALE
    OPERATION_SKIPPED = "operation_skipped", (), _OTHER_FUNCTION
    VALUE_OF_OTHER_POSITION = (
        "value_of_other_position",
        (),
        "The decode path works on the row of another token: check gather indices and offsets.",
    )

    # Recurrent states
    CONV_STATE_POST_CONV = "conv_state_post_conv", STATE_SITES, _CONV_STATE
    CONV_STATE_STALE = "conv_state_stale", (Site.CONV_STATE, Site.ATTN_CTX, Site.ATTN_OUT), _CONV_STATE
    CONV_STATE_ORDER = "conv_state_order", (Site.CONV_STATE,), _CONV_STATE
    SSM_STATE_STALE = "ssm_state_stale", (Site.SSM_STATE, Site.ATTN_CTX, Site.ATTN_OUT), _SSM_STATE
    SSM_STATE_SCALE = "ssm_state_scale", (Site.SSM_STATE,), _SSM_STATE
    SSM_STATE_ROUNDED = "ssm_state_rounded", (Site.SSM_STATE,), _SSM_STATE
    SSM_STATE_TRANSPOSED = "ssm_state_transposed", (Site.SSM_STATE,), _SSM_STATE

    # What a recording says of itself
    TRACE_OFFSET = (
        "trace_offset",
        (),
        "Print the position that each pass hands to RoPE for the same token. If they are equal, the recorder counts "
        "wrongly; if not, the decode path must begin at the number of tokens in the cache.",
    )

    # Which token was chosen
    WRONG_CHOICE = (
        "wrong_choice",
        (Site.LOGITS,),
        "Look at what lies between logits and token: processors that were not asked for, the bookkeeping of beams, "
        "which drafts are accepted.",
    )


# Causes of planted faults that no explanation names: such a fault is found at its address and called by a cause that
# does the same to the values there, or "unexplained".
NEVER_NAMED = frozenset(
    {
        Cause.ACTIVATION_APPROXIMATED,
        Cause.BATCH_ROW_WRONG,
        Cause.CONTEXT_HEADS_PERMUTED,
        Cause.CONV_STATE_POST_CONV,
        Cause.HISTORY_LOST,
        Cause.K_V_SWAPPED,
        Cause.MATMUL_DTYPE,
        Cause.QUANTISED_AXIS_WRONG,
        Cause.QUANTISED_SCALE_WRONG,
        Cause.QUANTISED_TOO_COARSELY,
        Cause.REWIND_OVERSHOOT,
        Cause.REWIND_RESIDUE,
        Cause.ROPE_POSITIONS_ROUNDED,
        Cause.ROPE_ROWS_LOST,
        Cause.ROUTER_DTYPE,
        Cause.SLOT_SHIFTED,
        Cause.SLOT_ZEROED,
        Cause.SSM_STATE_TRANSPOSED,
    }
)

# What a constant factor is called where the site says what was scaled; elsewhere it is SCALED.
FACTOR_OF = {
    Site.EMBED_OUT: Cause.EMBEDDING_SCALE,
    Site.Q_ROPE: Cause.ROPE_ATTENTION_FACTOR,
    Site.K_ROPE: Cause.ROPE_ATTENTION_FACTOR,
    Site.LOGITS: Cause.LOGIT_SCALE,
    Site.SSM_STATE: Cause.SSM_STATE_SCALE,
}
