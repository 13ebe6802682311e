//! What tests/traces/test_writer_files.py writes from Python, from Rust: every dtype, slots, parts and attention.
#[path = "../../../examples/traces/kvdrift_trace.rs"]
mod kvdrift_trace;

use kvdrift_trace::{Attention, Dtype, Part, Rows, Writer};
use std::io;

fn main() -> io::Result<()> {
    let directory = std::env::args().nth(1).unwrap_or_default();
    let mut writer = Writer::new(directory, "e \"q\" \\ \n", "m", "bfloat16", 2)?;
    writer.absent(&["q_norm", "k_norm"]);
    for kind in ["prefill", "prefill_again", "decode"] {
        let tokens = [5, 6, 7, 8];
        let mut pass = match kind {
            "prefill" => writer.prefill("p", &tokens),
            "prefill_again" => writer.prefill_again("p", &tokens),
            _ => writer.decode("p", &tokens, "as_designed"),
        };
        match kind {
            "decode" => pass.call(3, 1, 3),
            _ => pass.call(0, 4, 0),
        }
        let how = Attention { scale: 0.1, softcap: Some(30.5), window: Some(3), ..Attention::default() };
        pass.attention(0, Attention { sinks: &[0.25, -1e-7], slopes: &[0.5, 0.25], ..how })?;
        pass.attention(1, Attention { scale: 0.125, ..Attention::default() })?;
        let f64s: Vec<f64> = (0..6).map(|i| -1.25 + f64::from(i) * 0.5).collect();
        let f32s: Vec<f32> = f64s.iter().map(|value| *value as f32).collect();
        let half: Vec<u16> = (0..6).map(|i| 0x3c00 + i).collect();
        let byte: Vec<u8> = (0..6).map(|i| 0x30 + i).collect();
        let of = |dtype| Rows { dtype: Some(dtype), ..Rows::default() };
        let slots = [3, 1, 2];
        pass.rows("embed_out", None, &[3], &f64s, &[1, 6], Rows::default())?;
        pass.rows("layer_in", Some(0), &[3], &f32s, &[1, 6], Rows::default())?;
        pass.rows("q_proj", Some(0), &[3], &half, &[1, 6], of(Dtype::F16))?;
        pass.rows("q_rope", Some(0), &[3], &half, &[1, 3, 2], of(Dtype::BF16))?;
        pass.cache("k_cache", 0, 3, &byte, &[3, 1, 2], Rows { slots: &slots, ..of(Dtype::F8E4M3) })?;
        pass.cache("v_cache", 0, 3, &byte, &[3, 1, 2], Rows { slots: &slots, ..of(Dtype::F8E5M2) })?;
        pass.cache("k_cache", 1, 3, &half, &[3, 1, 2], of(Dtype::BF16))?;
        pass.rows("attn_probs", Some(0), &[3], &f32s, &[1, 2, 3], Rows { slots: &slots, ..Rows::default() })?;
        for rank in [0, 1] {
            let mine = &f32s[rank * 3..][..3];
            let span = Some((rank * 3, rank * 3 + 3));
            let part = |heads, columns| Rows { part: Some(Part { rank, heads, columns }), ..Rows::default() };
            pass.rows("attn_ctx", Some(0), &[3], mine, &[1, 3, 1], part(span, None))?;
            pass.rows("mlp_out", Some(0), &[3], mine, &[1, 3], part(None, span))?;
            pass.rows("attn_out", Some(0), &[3], &f32s, &[1, 6], part(None, None))?;
        }
        writer.add(pass)?;
    }
    writer.finish()
}
