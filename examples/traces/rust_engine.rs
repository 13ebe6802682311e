//! A one-layer attention engine in Rust that writes traces for `kvdrift judge`.
//!
//!     rustc --edition 2021 -O examples/traces/rust_engine.rs -o rust_engine && ./rust_engine traces [scale|stale]
//!     kvdrift judge traces
//!
//! The same code runs at f32 and at f64, which gives `judge` its precision ladder. Its cache is a ring of the last six
//! tokens, so that each row says which position it holds. Prefill sums the keys from the first slot to the last, decode
//! from the last to the first, so that the two round differently.
#[path = "kvdrift_trace.rs"]
mod kvdrift_trace;

use kvdrift_trace::{Attention, Pass, Rows, Value, Writer};
use std::io;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 8;
const WIDTH: usize = HEADS * DIM;
const KV_WIDTH: usize = KV_HEADS * DIM;
const VOCAB: usize = 50;
const WINDOW: usize = 6;

/// The arithmetic that the engine computes in.
trait Real: Value {
    fn of(value: f64) -> Self;
    fn wide(self) -> f64;
    fn sum(self, other: Self) -> Self;
    fn product(self, other: Self) -> Self;
}

macro_rules! real {
    ($kind:ty) => {
        impl Real for $kind {
            fn of(value: f64) -> Self {
                value as $kind
            }
            fn wide(self) -> f64 {
                self as f64
            }
            fn sum(self, other: Self) -> Self {
                self + other
            }
            fn product(self, other: Self) -> Self {
                self * other
            }
        }
    };
}
real!(f32);
real!(f64);

/// Small reproducible weights: the low bits of a linear congruential generator.
fn weights<T: Real>(mut seed: u32, n: usize, size: f64) -> Vec<T> {
    let mut next = || {
        seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
        T::of((f64::from(seed >> 8) / f64::from(1 << 23) - 1.0) * size)
    };
    (0..n).map(|_| next()).collect()
}

struct Engine<T> {
    embedding: Vec<T>,
    weights: [Vec<T>; 3], // of queries, keys and values
    keys: Vec<T>,         // the ring, [slot, kv head, dim]
    values: Vec<T>,
    bug: String,
}

impl<T: Real> Engine<T> {
    fn new(bug: &str) -> Engine<T> {
        Engine {
            embedding: weights(1, VOCAB * WIDTH, 1.0),
            weights: [WIDTH, KV_WIDTH, KV_WIDTH].map(|n| weights(n as u32, WIDTH * n, 0.6)),
            keys: vec![T::of(0.0); WINDOW * KV_WIDTH],
            values: vec![T::of(0.0); WINDOW * KV_WIDTH],
            bug: bug.to_string(),
        }
    }

    /// Feeds one token on top of the cache, and records it if there is a pass.
    fn step(&mut self, token: i64, p: usize, decoding: bool, out: Option<&mut Pass>) -> io::Result<()> {
        let x = self.embedding[token as usize * WIDTH..][..WIDTH].to_vec();
        let [q, k, v] = [0, 1, 2].map(|i| product(&x, &self.weights[i], decoding));
        let slot = p % WINDOW * KV_WIDTH;
        self.keys[slot..slot + KV_WIDTH].copy_from_slice(&k);
        self.values[slot..slot + KV_WIDTH].copy_from_slice(&v);
        let held = (p + 1).min(WINDOW);
        // The position that each slot of the ring holds.
        let slots: Vec<i64> = (0..held).map(|s| (p - (p + WINDOW - s) % WINDOW) as i64).collect();
        if decoding && self.bug == "stale" {
            let (first, second) = ((p - 2) % WINDOW * KV_WIDTH, (p - 3) % WINDOW * KV_WIDTH);
            self.keys.copy_within(second..second + KV_WIDTH, first);
        }
        let scale = (DIM as f64).powf(-0.5) * if decoding && self.bug == "scale" { 1.01 } else { 1.0 };
        let context = self.attend(&q, held, T::of(scale), decoding);
        let Some(out) = out else { return Ok(()) };
        let layer_out: Vec<T> = x.iter().zip(&context).map(|(a, b)| a.sum(*b)).collect();
        let head: Vec<T> = (0..WIDTH * VOCAB).map(|i| self.embedding[i % VOCAB * WIDTH + i / VOCAB]).collect();
        let logits = product(&layer_out, &head, decoding);
        let rows = Rows::default();
        let cache = Rows { slots: &slots, ..rows };
        let n = held * KV_WIDTH;
        out.rows("embed_out", None, &[p], &x, &[1, WIDTH], rows)?;
        out.rows("q_proj", Some(0), &[p], &q, &[1, WIDTH], rows)?;
        out.rows("q_rope", Some(0), &[p], &q, &[1, HEADS, DIM], rows)?; // this engine has no rotation
        out.rows("k_proj", Some(0), &[p], &k, &[1, KV_WIDTH], rows)?;
        out.rows("v_proj", Some(0), &[p], &v, &[1, KV_WIDTH], rows)?;
        out.cache("k_cache", 0, p, &self.keys[..n], &[held, KV_HEADS, DIM], cache)?;
        out.cache("v_cache", 0, p, &self.values[..n], &[held, KV_HEADS, DIM], cache)?;
        out.rows("attn_ctx", Some(0), &[p], &context, &[1, HEADS, DIM], rows)?;
        out.rows("layer_out", Some(0), &[p], &layer_out, &[1, WIDTH], rows)?;
        out.rows("logits", None, &[p], &logits, &[1, VOCAB], rows)
    }

    fn attend(&self, q: &[T], held: usize, scale: T, decoding: bool) -> Vec<T> {
        let mut out = vec![T::of(0.0); WIDTH];
        for h in 0..HEADS {
            let at = |s: usize| s * KV_WIDTH + h / (HEADS / KV_HEADS) * DIM;
            let query = &q[h * DIM..][..DIM];
            let dot = |s: usize| (0..DIM).fold(T::of(0.0), |sum, d| sum.sum(query[d].product(self.keys[at(s) + d])));
            let scores: Vec<f64> = (0..held).map(|s| dot(s).product(scale).wide()).collect();
            let top = scores.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
            let powers: Vec<T> = scores.iter().map(|score| T::of((score - top).exp())).collect();
            let total: T = powers.iter().fold(T::of(0.0), |sum, power| sum.sum(*power));
            for step in 0..held {
                let s = if decoding { held - 1 - step } else { step };
                let p = T::of(powers[s].wide() / total.wide());
                for d in 0..DIM {
                    out[h * DIM + d] = out[h * DIM + d].sum(p.product(self.values[at(s) + d]));
                }
            }
        }
        out
    }
}

/// The row `x` times a matrix [x, n].
fn product<T: Real>(x: &[T], w: &[T], decoding: bool) -> Vec<T> {
    let n = w.len() / x.len();
    let mut out = vec![T::of(0.0); n];
    for step in 0..x.len() {
        let i = if decoding { x.len() - 1 - step } else { step };
        for j in 0..n {
            out[j] = out[j].sum(x[i].product(w[i * n + j]));
        }
    }
    out
}

fn run<T: Real>(writer: &mut Writer, name: &str, tokens: &[i64], rung: &str, bug: &str) -> io::Result<()> {
    let first = tokens.len() - 2; // the last two tokens are decoded
    for mode in ["", "as_designed", "kv_aligned"] {
        let decodes = !mode.is_empty();
        let mut engine = Engine::<T>::new(bug);
        let mut pass = match mode {
            "" => writer.prefill_at(rung, name, tokens),
            mode => writer.decode_at(rung, name, tokens, mode),
        };
        let how = Attention { scale: (DIM as f64).powf(-0.5), window: Some(WINDOW), ..Attention::default() };
        pass.attention(0, how)?;
        if !decodes {
            pass.call(0, tokens.len(), 0);
        }
        for (p, token) in tokens.iter().enumerate() {
            let probed = p >= first;
            if decodes && probed {
                pass.call(p, 1, p);
            }
            let ring = (engine.keys.clone(), engine.values.clone());
            engine.step(*token, p, decodes && probed, probed.then_some(&mut pass))?;
            if mode == "kv_aligned" && probed {
                (engine.keys, engine.values) = ring; // the next step reads the row that prefill writes for this token
                engine.step(*token, p, false, None)?;
            }
        }
        writer.add(pass)?;
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, directory, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: rust_engine DIRECTORY [scale|stale]");
        std::process::exit(2);
    };
    let bug = rest.first().map_or("", String::as_str);
    let mut writer = Writer::new(directory, "rust_engine", "one attention layer", "float32", 1)?;
    for (name, tokens) in [("a", &[3, 14, 15, 9, 26, 5, 35, 8, 9, 7][..]), ("b", &[2, 7, 18, 28, 1, 8, 28, 4, 5])] {
        run::<f32>(&mut writer, name, tokens, "float32", bug)?;
        run::<f64>(&mut writer, name, tokens, "float64", bug)?;
    }
    writer.finish()
}
