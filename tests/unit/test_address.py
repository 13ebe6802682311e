"""Addresses and the forward order of sites."""

import itertools

import pytest

from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import (
    AFTER_LAYERS,
    ATTENTION_ROW_SITES,
    BEFORE_LAYERS,
    CACHE_SITES,
    EXPECTED_SITES,
    STATE_SITES,
    Site,
    forward_rank,
)

ORDER = [
    "embed_out",
    "layer_in",
    "attn_norm_out",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_norm",
    "k_norm",
    "q_rope",
    "k_rope",
    "k_cache",
    "v_cache",
    "attn_scores",
    "attn_probs",
    "attn_ctx",
    "attn_out",
    "resid_attn",
    "ffn_norm_out",
    "router",
    "mlp_out",
    "conv_state",
    "ssm_state",
    "layer_out",
    "final_norm_out",
    "logits",
]


def test_the_forward_order_is_the_one_that_was_agreed() -> None:
    assert [str(site) for site in Site] == ORDER


def test_a_forward_pass_is_walked_in_its_order() -> None:
    inner = [site for site in Site if site not in BEFORE_LAYERS | AFTER_LAYERS]
    walk = [(None, Site.EMBED_OUT), *itertools.product((0, 1, 40), inner), (None, Site.FINAL_NORM_OUT)]
    ranks = [forward_rank(layer, site) for layer, site in [*walk, (None, Site.LOGITS)]]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)


def test_sets_of_sites_do_not_overlap() -> None:
    for first, second in itertools.combinations((BEFORE_LAYERS, AFTER_LAYERS, CACHE_SITES, STATE_SITES), 2):
        assert not first & second
    assert not ATTENTION_ROW_SITES & CACHE_SITES
    assert not STATE_SITES & set(EXPECTED_SITES)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("p", 3, 2, Site.Q_PROJ), "p / pos 3 / layer 2 / q_proj"),
        (Address("p", 3, None, Site.LOGITS), "p / pos 3 / logits"),
        (Address("p", 3, 0, Site.ATTN_CTX, head=0), "p / pos 3 / layer 0 / attn_ctx / head 0"),
    ],
)
def test_an_address_reads_from_the_outside_in(address: Address, text: str) -> None:
    assert str(address) == text
    assert address.forward_rank == forward_rank(address.layer, address.site)
