"""Clean models of many architectures: never a MISMATCH, and the sites are found by role."""

import pytest

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import EXPECTED_SITES, Site
from tests.support.audits import CLEAN_PROMPTS, CORE, by_architecture, clean_audit
from tests.support.matrix import further
from tests.support.tiny import ARCHITECTURES, tiny_model

# Sites that the architecture has no place for, by what is written in its own code.
NOT_OFFERED = {
    "gpt_neox": {"resid_attn"},  # parallel residual: the second norm reads the layer's input
    "phi": {"resid_attn", "ffn_norm_out"},  # one norm feeds attention and MLP
    "falcon": {"q_rope", "resid_attn", "ffn_norm_out"},  # parallel, and no attention interface
    "bloom": {"q_rope"},  # no attention interface
    "deepseek_v3": {"q_proj", "k_proj", "v_proj"},  # queries, keys and values come out of two low-rank products each
    "gemma3n": {
        "layer_in",
        "layer_out",
    },  # four streams run between the layers, and each layer predicts and corrects them
}
IN_SOME_LAYERS = {
    "deepseek_v3": ["router"],  # the first layer is dense
    "gemma3n": ["k_proj", "v_proj", "k_norm", "k_rope"],  # the last layers read the keys and values of an earlier one
}
RECURRENT = ("mamba", "mamba2")
HYBRID = ("bamba", "qwen3_next", "jamba")  # attention in some layers, recurrence in the others
MIXED = ("falcon_h1", "zamba2")  # attention and recurrence side by side in a layer, in all of them or in some
ATTENTION_ONLY = [name for name in ARCHITECTURES if name not in (*RECURRENT, *HYBRID, *MIXED)]

# Where transformers itself is wrong; each is described in docs/findings, and goes on failing until it is mended there.
FINDINGS = {"bamba": (1, Site.Q_ROPE), "zamba2": (0, Site.SSM_STATE)}


@pytest.mark.parametrize("name", by_architecture((name for name in ARCHITECTURES if name not in FINDINGS), core=CORE))
def test_a_clean_model_passes(name: str) -> None:
    check_passes(clean_audit(name, "bfloat16"))


@pytest.mark.parametrize("name", by_architecture((name for name in ARCHITECTURES if name not in FINDINGS), core=()))
def test_a_clean_model_passes_at_another_dtype(name: str) -> None:
    """Every other architecture at float32, those between them at float16."""
    check_passes(clean_audit(name, ("float32", "float16")[list(ARCHITECTURES).index(name) % 2]))


def check_passes(audit: Audit) -> None:
    """Assert that the audit of a clean model is a pass in which every tensor had its counterpart."""
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.view["reasons"])
    assert audit.first_failure is None
    assert audit.exit_code == 0
    assert audit.view["coverage"]["n_unpaired"] == 0


@pytest.mark.parametrize("name", by_architecture(FINDINGS, core=("bamba",)))
def test_a_known_finding_is_found_where_it_is(name: str) -> None:
    audit = clean_audit(name)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == FINDINGS[name]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_float64_model_passes(attention: str) -> None:
    """Its own dtype is the top rung, and what it rounds to there is measured."""
    audit = clean_audit("llama", "float64", attention)

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT, audit.view["reasons"]
    assert audit.view["coverage"]["rungs"] == ["float64"]


@pytest.mark.parametrize("name", by_architecture(ATTENTION_ONLY, core=CORE))
def test_every_site_is_found_by_role(name: str) -> None:
    coverage = clean_audit(name, "bfloat16").view["coverage"]

    assert set(coverage["sites_not_offered"]) == NOT_OFFERED.get(name, set())
    assert list(coverage["sites_in_some_layers_only"]) == IN_SOME_LAYERS.get(name, [])
    wanted = {str(site) for site in EXPECTED_SITES} - NOT_OFFERED.get(name, set())
    assert wanted <= set(coverage["sites_recorded"])


@pytest.mark.parametrize("name", by_architecture(HYBRID, core=("qwen3_next",)))
def test_layers_of_a_hybrid_show_what_each_has(name: str) -> None:
    coverage = clean_audit(name, "bfloat16").view["coverage"]

    assert {"k_cache", "attn_probs", "conv_state"} <= set(coverage["sites_in_some_layers_only"])
    assert not coverage["sites_not_offered"]


@pytest.mark.parametrize(
    ("name", "site"),
    [
        pytest.param(name, site, marks=[pytest.mark.xdist_group(name), *(() if name in CORE else [pytest.mark.matrix])])
        for name, site in (
            ("qwen3", Site.Q_NORM),
            ("qwen3", Site.K_NORM),
            ("gemma3", Site.Q_NORM),
            ("mixtral", Site.ROUTER),
            ("qwen3_moe", Site.ROUTER),
            ("gpt_oss", Site.ROUTER),
            ("mamba", Site.SSM_STATE),
            ("mamba2", Site.SSM_STATE),
            ("mamba2", Site.CONV_STATE),
        )
    ],
)
def test_sites_that_only_some_architectures_have_are_recorded(name: str, site: Site) -> None:
    coverage = clean_audit(name, "bfloat16").view["coverage"]

    assert coverage["sites_recorded"][site] == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", by_architecture(["llama", "qwen3", "phi3", "gpt2"], core=("llama",)))
def test_both_attention_implementations_pass_and_are_told_apart(name: str, attention: str) -> None:
    audit = clean_audit(name, attention=None if attention == "sdpa" else attention)  # sdpa is their default

    kernels = {
        kernel for route in audit.view["coverage"]["routes"] for call in route["decode"] for kernel in call["kernels"]
    }
    assert audit.verdict is Verdict.STRUCTURAL_DRIFT
    assert kernels == ({"softmax"} if attention == "eager" else {"sdpa:flash"}), kernels


@pytest.mark.parametrize("name", ["llama", *further("qwen3", "mixtral")])
def test_a_static_cache_passes(name: str) -> None:
    audit = kvdrift.audit(tiny_model(name), prompts=CLEAN_PROMPTS, cache="static")

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.view["reasons"])
    assert audit.view["environment"]["cache"] == "static"


def test_operations_pinned_to_float32_are_no_plateau() -> None:
    """Eager attention takes its softmax in float32 whatever the model's dtype; so do norms and RoPE tables."""
    audit = clean_audit("llama", "bfloat16", "eager")

    ladder = [item for item in audit.evidence if item.instrument == "ladder"]
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    assert all(item.statistic is not None and item.statistic < 0.01 for item in ladder)
    noise = [item for item in audit.evidence if item.instrument == "noise"]
    assert {item.mode for item in noise} == {item.mode for item in ladder} == {"as_designed", "kv_aligned"}
    assert all(item.detail["begins"] == {} and item.detail["n_places"] for item in noise), [i.text for i in noise]
    assert "PINNED" not in {caveat.code for caveat in audit.caveats}


def test_a_cache_that_cannot_go_back_leaves_kv_aligned_out_and_says_so() -> None:
    audit = clean_audit("mamba2")

    assert audit.view["modes"]["kv_aligned"]["status"] == "NOT RUN"
    assert "MODE_NOT_RUN" in {caveat.code for caveat in audit.caveats}
    assert "only one mode ran" in audit.view["hypotheses"]["conclusion"].lower()
