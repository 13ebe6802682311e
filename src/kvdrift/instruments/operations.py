"""The operations of a decoder layer: what each site is computed from, and how coarsely that may round."""

from __future__ import annotations

from kvdrift.sites import ATTENTION_ROW_SITES, CACHE_SITES, Site
from kvdrift.trace.model import Roundoffs

Place = tuple[int, str]  # layer, site

# What each site is computed from; a site that a model lacks stands for what it is computed from itself.
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

# Float32 roundings by which a row-wise operation may differ between two batch shapes, generously: a sum over a row in
# another order, an exponential or a root by another code path.
ROW_WISE_ROUNDINGS = 16.0
# Products differ by one rounding of the native dtype; kernels that reduce partial sums at it, by a few.
PRODUCT_ROUNDINGS = 4.0
# Attention rounds its probabilities too, and its output is small where values cancel.
ATTENTION_ROUNDINGS = 16.0


def roundoff_at(site: Site, roundoffs: Roundoffs) -> float:
    """Return the unit roundoff of what is computed at a site, that of its inputs included."""
    if site in CACHE_SITES:
        return roundoffs.cache
    return roundoffs.attention if site in ATTENTION_ROW_SITES | {Site.ATTN_CTX} else roundoffs.product


def configured_bound(site: Site, roundoffs: Roundoffs) -> float:
    """Return the relative difference that rounding may make at a site whose inputs are equal, where every kind of
    operation has a roundoff of its own and hands on float32 values."""
    if site in CACHE_SITES:
        return PRODUCT_ROUNDINGS * roundoffs.cache
    if site in ROW_WISE:
        return ROW_WISE_ROUNDINGS * roundoffs.row_wise
    if site is Site.ATTN_SCORES:
        return PRODUCT_ROUNDINGS * roundoffs.attention
    if site is Site.ATTN_PROBS:
        return 4.0 * ATTENTION_ROUNDINGS * roundoffs.attention
    if site is Site.ATTN_CTX:
        return ATTENTION_ROUNDINGS * roundoffs.attention
    return PRODUCT_ROUNDINGS * roundoffs.product
