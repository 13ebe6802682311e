"""Why types of the zoo do not pass: a finding that a script of the engine alone confirms, or a reason in words.

A cell that is not named here is shown as unexplained by the page; a type that passes is not looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvdrift.report.schema.others import ZooRowView

_PASSES = ("EXACT", "STRUCTURAL_DRIFT")
DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why some types do not pass some scenarios.

    Attributes:
        types: the types.
        scenarios: the scenarios, "decode" for plain decode; empty for every one of these types, as where plain decode
            itself is wrong.
        finding: the stem of its page in docs/findings; "" where `reason` says all.
        reason: what is to be said beside the finding.
    """

    types: frozenset[str]
    scenarios: frozenset[str] = frozenset()
    finding: str = ""
    reason: str = ""

    def explains(self, kind: str, scenario: str) -> bool:
        """Whether a type in a scenario is meant."""
        return kind in self.types and (not self.scenarios or scenario in self.scenarios)


def _of(types: str, scenarios: str = "", finding: str = "", reason: str = "") -> Explanation:
    return Explanation(frozenset(types.split()), frozenset(scenarios.split()), finding, reason)


_SLIDING = (
    "afmoe beam cohere2 cohere2_moe dots3_note_text exaone4 exaone_moe gemma2 gemma3 gemma3_text gemma3n_text gemma4 "
    "gemma4_text gemma4_unified gemma4_unified_text gpt_oss kolibri1 llama4 llama4_text ministral mistral olmo3 "
    "vaultgemma"
)
_RECURRENT = (
    "bailing_hybrid falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 olmo_hybrid qwen3_5 "
    "qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text zamba zaya"
)
_BART = (
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart trocr "
    "whisper"
)
_ROBERTA = "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod"
_SEVERAL = "chunked_prefill verify recurrent_state prefix_reuse long_context"
_GEMMA = f"{_SEVERAL} window_edge batch_padded generate_greedy beams"
_EMPTY = "its model keeps no keys and values in a cache of transformers"

# Of transformers 5.23.0.
OF_HF: tuple[Explanation, ...] = (
    _of("bamba", finding="bamba_positions_on_a_cache"),
    _of("moshi", finding="moshi_window"),
    _of("nemotron_h", finding="nemotron_h_step_limit"),
    _of("prophetnet", finding="prophetnet_later_tokens", reason="it refuses several tokens on a cache by an error"),
    _of("zamba2", finding="zamba2_time_step_of_a_decode_step"),
    _of(_SLIDING, "export_import", "export_import_of_a_sliding_cache"),
    _of("axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4", "export_import", "indexer_of_a_moved_cache"),
    _of(
        "deepseek_v4",
        "export_import rewind rewind_edge draft_rounds select_rows static_cache",
        "deepseek_v4_cache",
    ),
    _of("deepseek_v4", "batch_padded generate_greedy", "deepseek_v4_padding"),
    _of(_RECURRENT, "rewind rewind_edge draft_rounds", "crop_of_a_recurrent_state"),
    _of("falcon_mamba jamba mamba zamba", _SEVERAL, "mamba_state_of_several_tokens"),
    _of("falcon_mamba mamba", "batch_padded", "mamba_mask_of_a_decode_step"),
    _of("recurrent_gemma", _GEMMA, "recurrent_gemma_states"),
    _of("recurrent_gemma", "generate_beam", "recurrent_gemma_beams"),
    _of("falcon_h1 inkling2_text inkling_text zaya", "select_rows", "rows_of_a_hybrid_cache"),
    _of(_BART, "batch_padded generate_greedy", "bart_left_padding"),
    _of(
        "musicgen musicgen_melody",
        "generate_greedy generate_beam generate_assisted",
        reason="their own `generate` wants a first token, which a decoder alone lacks, and has no beams and drafts",
    ),
    _of(_ROBERTA, "generate_greedy generate_beam generate_assisted", "roberta_positions_of_generate"),
    _of("git", "batch_padded generate_greedy", "git_padding_of_a_decode_step"),
    _of("doge", "last_positions generate_assisted", "doge_equal_tokens"),
    _of("gpt_neo", "static_cache", "gpt_neo_static_cache"),
    _of("openai-gpt reformer rwkv xlm xlnet", reason=_EMPTY),
    _of("hrm_text", reason="its layers run several times in one call, for which an address has no place"),
    _of("gemma3n", reason="it needs another package"),
    _of("blt", reason="it reads patches of bytes, in two models of which none has the layers of a decoder"),
    _of("dots3_note gemma4_assistant gemma4_unified_assistant", reason="its parts made small do not fit each other"),
    _of("cpmant", reason="its own decode step raises an error on the cache that its prefill left"),
    _of("minimax", reason="its model refuses every cache but one of its own, which is made inside a call"),
    _of("xlstm", reason="its own decode step refuses the state that it left"),
)
# Of mlx-lm 0.32.2.
OF_MLX: tuple[Explanation, ...] = (
    _of("plamo3", finding="plamo3_window_of_a_ring"),
    _of("phi3small", finding="mlx_phi3small_mask"),
    _of("mamba jamba", "batch_padded", "mlx_rows_of_unequal_length"),
    _of("bitnet muse_spark", reason="it has a kernel for Metal alone"),
    _of("olmo", reason="its module ends the process where another package is missing"),
    _of("iquestloopcoder", reason="its layers run twice in one call, for which an address has no place"),
    _of("deepseek_v41", reason="scores of its window are seen in a decode step alone, so that they have no partner"),
    _of("prism_hadamard_qwen35", reason="it takes weights of two bits that a packer made, and random ones are none"),
)
EXPLAINED: Mapping[str, Sequence[Explanation]] = {"hf": OF_HF, "mlx": OF_MLX}


def cells(row: ZooRowView) -> list[tuple[str, str]]:
    """Return what a row does not pass: scenario and verdict, plain decode under the name "decode"."""
    found = [(DECODE, row.state), *row.verdicts.items()]
    return [(scenario, verdict) for scenario, verdict in found if verdict not in _PASSES]


def explained(rows: Sequence[ZooRowView], engine: str) -> tuple[list[tuple[Explanation, str]], list[str]]:
    """Return which explanations the rows need, each with what it is of, and the cells that none explains."""
    needed: dict[int, dict[str, list[str]]] = {}
    left: list[str] = []
    for row in sorted(rows, key=lambda row: row.type):
        for scenario, verdict in cells(row):
            numbers = [i for i, each in enumerate(EXPLAINED[engine]) if each.explains(row.type, scenario)]
            for number in numbers:
                needed.setdefault(number, {}).setdefault(row.type, []).append(scenario)
            if not numbers:
                left.append(f"{row.type} {scenario} {verdict}")
    return [(EXPLAINED[engine][i], _cells_of(of)) for i, of in sorted(needed.items())], left


def _cells_of(of: Mapping[str, Sequence[str]]) -> str:
    scenarios = list(dict.fromkeys(name for names in of.values() for name in names))
    every = len(scenarios) > 8 or DECODE in scenarios
    return f"{', '.join(of)}: {'all' if every else ', '.join(scenarios)}"


__all__ = ["DECODE", "EXPLAINED", "Explanation", "cells", "explained"]
