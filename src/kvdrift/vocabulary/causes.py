"""The causes that a diagnosis can name."""

from kvdrift.vocabulary.sites import Site

# What a diagnosis says where no cause of the catalogue explains enough.
UNEXPLAINED = "unexplained"

# What a constant factor is called where the site says what was scaled.
FACTOR_OF = {
    Site.EMBED_OUT: "embedding_scale",
    Site.Q_ROPE: "rope_attention_factor",
    Site.K_ROPE: "rope_attention_factor",
    Site.LOGITS: "logit_scale",
    Site.SSM_STATE: "ssm_state_scale",
}
