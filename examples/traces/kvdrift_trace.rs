//! Writes traces for `kvdrift judge` out of a Rust engine. One file, the standard library alone; edition 2021.
//!
//! ```ignore
//! #[path = "kvdrift_trace.rs"]
//! mod kvdrift_trace;
//! use kvdrift_trace::{Attention, Dtype, Rows, Writer};
//!
//! let mut writer = Writer::new("traces", "myengine 1.0", "my model", "float32", n_layers)?;
//! let mut pass = writer.prefill("p0", &token_ids); // then writer.decode("p0", &token_ids, "as_designed")
//! pass.call(0, n, 0); // start, tokens fed, tokens in the cache before
//! pass.rows("q_rope", Some(layer), &[position], &q, &[1, n_heads, head_dim], Rows::default())?;
//! pass.cache("k_cache", layer, position, &keys, &[n_slots, n_kv_heads, head_dim], Rows { slots: &slots, ..Rows::default() })?;
//! writer.add(pass)?;
//! writer.finish()?;
//! ```
//!
//! docs/trace-format.md lists the sites and says what a verdict needs. Half precision and float8 are passed as their bits,
//! `&[u16]` and `&[u8]`, with `dtype` saying which they are. Everything is written little-endian.
#![allow(dead_code)]

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// The dtypes of values, by their names in safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    I64,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::F8E5M2 => "F8_E5M2",
            Dtype::I64 => "I64",
        }
    }

    fn width(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::F8E4M3 | Dtype::F8E5M2 => 1,
        }
    }
}

/// A number that lies in memory as a trace has it: f32, f64, and the bits of narrower floats as u16 and u8.
pub trait Value: Copy {
    /// What it is if nothing else is said; None where the bits may be of several dtypes.
    const DTYPE: Option<Dtype>;
    fn put(self, out: &mut Vec<u8>);
}

macro_rules! value {
    ($kind:ty, $dtype:expr) => {
        impl Value for $kind {
            const DTYPE: Option<Dtype> = $dtype;
            fn put(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    };
}
value!(f32, Some(Dtype::F32));
value!(f64, Some(Dtype::F64));
value!(i64, Some(Dtype::I64));
value!(u16, None);
value!(u8, None);

/// What a rank of an engine that splits its layers holds; with neither heads nor columns it is an addend of a sum.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub rank: usize,
    pub heads: Option<(usize, usize)>,
    pub columns: Option<(usize, usize)>,
}

/// What is said of values beside their shape.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rows<'a> {
    /// Needed for u16 and u8, whose bits may be of several dtypes.
    pub dtype: Option<Dtype>,
    /// The position of each cache row or key column, where they are not 0, 1, 2 ..., as in a ring or in pages.
    pub slots: &'a [i64],
    pub part: Option<Part>,
}

/// How a layer attends; docs/trace-format.md says what each means.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attention<'a> {
    pub scale: f64,
    pub softcap: Option<f64>,
    pub window: Option<usize>,
    pub sinks: &'a [f64],
    pub slopes: &'a [f64],
    pub is_biased: bool,
}

/// One pass over one prompt.
pub struct Pass {
    head: String,
    header: String,
    data: Vec<u8>,
    records: String,
    calls: String,
    attention: String,
    count: usize,
}

impl Pass {
    fn new(prompt: &str, kind: &str, mode: &str, rung: &str, tokens: &[i64]) -> Pass {
        let mode = if mode.is_empty() { String::new() } else { format!(",\"mode\":{}", text(mode)) };
        let head = format!(
            "\"prompt\":{},\"pass_name\":{}{mode},\"rung\":{},\"tokens\":{}",
            text(prompt),
            text(kind),
            text(rung),
            list(tokens)
        );
        let empty = String::new;
        Pass { head, header: empty(), data: Vec::new(), records: empty(), calls: empty(), attention: empty(), count: 0 }
    }

    /// Notes one forward call as it was made: path proof.
    pub fn call(&mut self, start: usize, q_len: usize, cache_len_before: usize) {
        let call = format!("{{\"start\":{start},\"q_len\":{q_len},\"cache_len_before\":{cache_len_before}}}");
        append(&mut self.calls, &call);
    }

    /// Records values [position, ...] of a site; `layer` is None for embed_out, final_norm_out and logits.
    pub fn rows<T: Value>(
        &mut self,
        site: &str,
        layer: Option<usize>,
        positions: &[usize],
        values: &[T],
        shape: &[usize],
        rows: Rows,
    ) -> io::Result<()> {
        if shape.first() != Some(&positions.len()) {
            return Err(wrong(format!("{site} has other rows than positions")));
        }
        self.record(site, layer, positions, values, shape, rows)
    }

    /// Records all rows [slot, head, dim] of k_cache or v_cache that attention read for one token.
    pub fn cache<T: Value>(
        &mut self,
        site: &str,
        layer: usize,
        position: usize,
        values: &[T],
        shape: &[usize; 3],
        rows: Rows,
    ) -> io::Result<()> {
        if !rows.slots.is_empty() && rows.slots.len() != shape[0] {
            return Err(wrong(format!("{site} has {} slots for {} rows", rows.slots.len(), shape[0])));
        }
        self.record(site, Some(layer), &[position], values, shape, rows)
    }

    /// Says how a layer attends. Needed for replay.
    pub fn attention(&mut self, layer: usize, how: Attention) -> io::Result<()> {
        let mut item = format!("{{\"layer\":{layer},\"scale\":{}", number(how.scale)?);
        if let Some(softcap) = how.softcap {
            write!(item, ",\"softcap\":{}", number(softcap)?).map_err(io::Error::other)?;
        }
        if let Some(window) = how.window {
            write!(item, ",\"window\":{window}").map_err(io::Error::other)?;
        }
        for (name, values) in [("sinks", how.sinks), ("slopes", how.slopes)] {
            if !values.is_empty() {
                let found = values.iter().map(|value| number(*value)).collect::<io::Result<Vec<_>>>()?;
                write!(item, ",\"{name}\":[{}]", found.join(",")).map_err(io::Error::other)?;
            }
        }
        item += if how.is_biased { ",\"is_biased\":true}" } else { "}" };
        append(&mut self.attention, &item);
        Ok(())
    }

    fn record<T: Value>(
        &mut self,
        site: &str,
        layer: Option<usize>,
        positions: &[usize],
        values: &[T],
        shape: &[usize],
        rows: Rows,
    ) -> io::Result<()> {
        let name = format!("{}.{site}", self.count);
        self.count += 1;
        let dtype = rows.dtype.or(T::DTYPE).ok_or_else(|| wrong(format!("{site} needs a dtype: Rows {{ dtype, .. }}")))?;
        self.tensor(&name, values, shape, dtype)?;
        let mut how = String::new();
        if !rows.slots.is_empty() {
            let slots = format!("{name}.slots");
            self.tensor(&slots, rows.slots, &[rows.slots.len()], Dtype::I64)?;
            how += &format!(",\"slots\":{}", text(&slots));
        }
        if let Some(part) = rows.part {
            how += &format!(",\"rank\":{}", part.rank);
            for (axis, span) in [("heads", part.heads), ("columns", part.columns)] {
                if let Some((first, stop)) = span {
                    how += &format!(",\"{axis}\":[{first},{stop}]");
                }
            }
        }
        let layer = layer.map_or("null".to_string(), |layer| layer.to_string());
        let head = format!("{{\"tensor\":{},\"site\":{},\"layer\":{layer}", text(&name), text(site));
        append(&mut self.records, &format!("{head},\"positions\":{}{how}}}", list(positions)));
        Ok(())
    }

    fn tensor<T: Value>(&mut self, name: &str, values: &[T], shape: &[usize], dtype: Dtype) -> io::Result<()> {
        let n: usize = shape.iter().product();
        if n == 0 || n != values.len() || std::mem::size_of::<T>() != dtype.width() {
            return Err(wrong(format!("{name}: {} values of {dtype:?} are not {shape:?}", values.len())));
        }
        let start = self.data.len();
        values.iter().for_each(|value| value.put(&mut self.data));
        let (name, dtype, end) = (text(name), dtype.name(), self.data.len());
        let shape = list(shape);
        append(
            &mut self.header,
            &format!("{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"),
        );
        Ok(())
    }
}

/// A directory of traces in the making; `finish` writes the manifest that makes it one.
pub struct Writer {
    directory: PathBuf,
    dtype: String,
    engine: String,
    absent: String,
    traces: String,
    count: usize,
}

impl Writer {
    /// Begins a directory, which must be new or empty.
    pub fn new(
        directory: impl AsRef<Path>,
        engine: &str,
        model: &str,
        dtype: &str,
        n_layers: usize,
    ) -> io::Result<Writer> {
        let directory = directory.as_ref().to_path_buf();
        fs::create_dir_all(&directory)?;
        if fs::read_dir(&directory)?.next().is_some() {
            return Err(wrong(format!("{} is not empty; name a new directory", directory.display())));
        }
        let engine = format!(
            "{{\"engine\":{},\"model\":{},\"dtype\":{},\"n_layers\":{n_layers}}}",
            text(engine),
            text(model),
            text(dtype)
        );
        Ok(Writer { directory, dtype: dtype.to_string(), engine, absent: String::new(), traces: String::new(), count: 0 })
    }

    /// Names sites that the model does not have, such as q_norm; others that are missing count as not recorded.
    pub fn absent(&mut self, sites: &[&str]) {
        sites.iter().for_each(|site| append(&mut self.absent, &text(site)));
    }

    /// All tokens at once.
    pub fn prefill(&self, prompt: &str, tokens: &[i64]) -> Pass {
        self.prefill_at(&self.dtype, prompt, tokens)
    }

    /// The same at another dtype than the engine's: a rung of the precision ladder, float32 or float64.
    pub fn prefill_at(&self, rung: &str, prompt: &str, tokens: &[i64]) -> Pass {
        Pass::new(prompt, "prefill", "", rung, tokens)
    }

    /// A second prefill of the first ones of the same tokens: what it differs by is the engine's own noise.
    pub fn prefill_again(&self, prompt: &str, tokens: &[i64]) -> Pass {
        Pass::new(prompt, "prefill_again", "", &self.dtype, tokens)
    }

    /// The last ones of the same tokens, one by one on top of a cache; `mode` is as_designed or kv_aligned.
    pub fn decode(&self, prompt: &str, tokens: &[i64], mode: &str) -> Pass {
        self.decode_at(&self.dtype, prompt, tokens, mode)
    }

    /// The same at another dtype than the engine's.
    pub fn decode_at(&self, rung: &str, prompt: &str, tokens: &[i64], mode: &str) -> Pass {
        Pass::new(prompt, "decode", mode, rung, tokens)
    }

    /// Writes a pass: eight bytes of length, the header, the values.
    pub fn add(&mut self, pass: Pass) -> io::Result<()> {
        let name = format!("pass{}", self.count);
        self.count += 1;
        let mut header = format!("{{{}}}", pass.header);
        while header.len() % 8 != 0 {
            header.push(' '); // so that the values are aligned
        }
        let file = format!("{name}.safetensors");
        let mut out = fs::File::create(self.directory.join(&file))?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        out.write_all(&pass.data)?;
        let (calls, attention, records) = (pass.calls, pass.attention, pass.records);
        let entry = format!(
            "\n{{\"name\":{},\"file\":{},{},\"calls\":[{calls}],\"attention\":[{attention}],\"records\":[{records}]}}",
            text(&name),
            text(&file),
            pass.head
        );
        append(&mut self.traces, &entry);
        Ok(())
    }

    /// Writes the manifest; the directory can be judged from then on.
    pub fn finish(self) -> io::Result<()> {
        let absent = if self.absent.is_empty() { String::new() } else { format!(",\"absent\":[{}]", self.absent) };
        let manifest = format!(
            "{{\"format\":\"kvdrift-trace\",\"format_version\":1,\"engine\":{}{absent},\"traces\":[{}]}}\n",
            self.engine, self.traces
        );
        fs::write(self.directory.join("manifest.json"), manifest)
    }
}

fn wrong(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("kvdrift: {text}"))
}

fn append(items: &mut String, item: &str) {
    if !items.is_empty() {
        items.push(',');
    }
    items.push_str(item);
}

fn text(value: &str) -> String {
    let mut out = String::from("\"");
    for c in value.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if (c as u32) < 0x20 => out += &format!("\\u{:04x}", c as u32),
            c => out.push(c),
        }
    }
    out + "\""
}

fn list<T: ToString>(items: &[T]) -> String {
    format!("[{}]", items.iter().map(T::to_string).collect::<Vec<_>>().join(","))
}

/// A number to the bit; JSON has no other than finite ones.
fn number(value: f64) -> io::Result<String> {
    if value.is_finite() {
        Ok(format!("{value:?}"))
    } else {
        Err(wrong(format!("{value} is not finite, which JSON cannot hold")))
    }
}
