"""The named tensors of a forward pass, in the one order in which a decoder computes them.

A site is a role, not a module: `attn_ctx` is what attention hands to its output projection, whatever the module is
called. The order defines "first failure", so it is fixed here and nowhere else.
"""

from collections.abc import Collection
from enum import StrEnum


class Site(StrEnum):
    """A named tensor of the forward pass; members are listed in forward order."""

    EMBED_OUT = "embed_out"  # token embedding
    LAYER_IN = "layer_in"
    ATTN_NORM_OUT = "attn_norm_out"
    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    Q_NORM = "q_norm"
    K_NORM = "k_norm"
    Q_ROPE = "q_rope"  # the query as attention receives it, position encoding included
    K_ROPE = "k_rope"  # the new keys as they enter the cache
    K_CACHE = "k_cache"  # the keys that attention reads, positions 0..t
    V_CACHE = "v_cache"
    ATTN_SCORES = "attn_scores"  # before softmax: scaled, capped, masked
    ATTN_PROBS = "attn_probs"  # after softmax
    ATTN_CTX = "attn_ctx"  # before the output projection
    ATTN_OUT = "attn_out"  # after the output projection
    RESID_ATTN = "resid_attn"
    FFN_NORM_OUT = "ffn_norm_out"
    ROUTER = "router"
    MLP_OUT = "mlp_out"
    CONV_STATE = "conv_state"
    SSM_STATE = "ssm_state"
    LAYER_OUT = "layer_out"
    FINAL_NORM_OUT = "final_norm_out"
    LOGITS = "logits"


FORWARD_ORDER: dict[Site, int] = {site: rank for rank, site in enumerate(Site)}

# Sites before the first layer and after the last one; every other site belongs to a layer.
BEFORE_LAYERS = frozenset({Site.EMBED_OUT})
AFTER_LAYERS = frozenset({Site.FINAL_NORM_OUT, Site.LOGITS})

# Sites whose value is one row per cached position instead of one row per probed token.
CACHE_SITES = frozenset({Site.K_CACHE, Site.V_CACHE})

# Sites that exist only after the last token of a call: a recurrence keeps no earlier states.
STATE_SITES = frozenset({Site.CONV_STATE, Site.SSM_STATE})

# Sites whose last axis is the key position, where a masked key is a legitimate -inf (scores) or 0 (probabilities).
ATTENTION_ROW_SITES = frozenset({Site.ATTN_SCORES, Site.ATTN_PROBS})

# Sites of a plain transformer decoder; the coverage names those that a model lacks.
EXPECTED_SITES = tuple(
    site for site in Site if site not in {Site.Q_NORM, Site.K_NORM, Site.ROUTER, Site.CONV_STATE, Site.SSM_STATE}
)


def forward_rank(layer: int | None, site: Site) -> tuple[int, int]:
    """Return the sort key of a (layer, site): embedding first, then layer by layer, final norm and logits last.

    >>> forward_rank(0, Site.K_CACHE) < forward_rank(0, Site.ATTN_OUT) < forward_rank(1, Site.LAYER_IN)
    True
    """
    if site in BEFORE_LAYERS:
        return (-1, FORWARD_ORDER[site])
    if site in AFTER_LAYERS or layer is None:
        return (1 << 30, FORWARD_ORDER[site])
    return (layer, FORWARD_ORDER[site])


# Inputs of each site. For a site that a model lacks, its own inputs take its place.
PARENTS: dict[Site, tuple[Site, ...]] = {
    Site.ATTN_NORM_OUT: (Site.LAYER_IN,),
    Site.Q_PROJ: (Site.ATTN_NORM_OUT,),
    Site.K_PROJ: (Site.ATTN_NORM_OUT,),
    Site.V_PROJ: (Site.ATTN_NORM_OUT,),
    Site.Q_NORM: (Site.Q_PROJ,),
    Site.K_NORM: (Site.K_PROJ,),
    Site.Q_ROPE: (Site.Q_NORM,),
    Site.K_ROPE: (Site.K_NORM,),
    Site.K_CACHE: (Site.K_ROPE,),
    Site.V_CACHE: (Site.V_PROJ,),
    Site.ATTN_SCORES: (Site.Q_ROPE, Site.K_CACHE),
    Site.ATTN_PROBS: (Site.ATTN_SCORES,),
    Site.ATTN_CTX: (Site.Q_ROPE, Site.K_CACHE, Site.V_CACHE),
    Site.ATTN_OUT: (Site.ATTN_CTX,),
    Site.RESID_ATTN: (Site.LAYER_IN, Site.ATTN_OUT),
    Site.FFN_NORM_OUT: (Site.RESID_ATTN,),
    Site.ROUTER: (Site.FFN_NORM_OUT,),
    Site.MLP_OUT: (Site.FFN_NORM_OUT, Site.ROUTER),
    Site.LAYER_OUT: (Site.RESID_ATTN, Site.MLP_OUT),
}


ROW_WISE = frozenset(
    {
        Site.ATTN_NORM_OUT,
        Site.Q_NORM,
        Site.K_NORM,
        Site.Q_ROPE,
        Site.K_ROPE,
        Site.RESID_ATTN,
        Site.FFN_NORM_OUT,
        Site.LAYER_OUT,
        Site.FINAL_NORM_OUT,
    }
)


def producers_of(
    layer: int | None, site: Site, known: Collection[tuple[int | None, Site]]
) -> list[tuple[int | None, Site]]:
    """Return the places that `site` of `layer` is computed from, those alone that are in `known`.

    A place that is not known gives way to what it is itself computed from. The layer below hands on its `layer_out`,
    the last layer to the final norm.

    >>> producers_of(1, Site.Q_PROJ, {(1, Site.LAYER_IN), (0, Site.LAYER_OUT)})
    [(1, <Site.LAYER_IN: 'layer_in'>)]
    """
    last = max((at for at, _ in known if at is not None), default=None)
    direct: list[tuple[int | None, Site]]
    if site is Site.LAYER_IN:
        direct = [(layer - 1, Site.LAYER_OUT)] if layer else [(None, Site.EMBED_OUT)]
    elif site is Site.FINAL_NORM_OUT:
        direct = [] if last is None else [(last, Site.LAYER_OUT)]
    elif site is Site.LOGITS:
        direct = [(None, Site.FINAL_NORM_OUT)]
    else:
        direct = [(layer, parent) for parent in PARENTS.get(site, ())]
    found: list[tuple[int | None, Site]] = []
    for place in direct:
        found += [place] if place in known else producers_of(*place, known)
    return list(dict.fromkeys(found))
