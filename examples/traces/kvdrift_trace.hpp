// Writes traces for `kvdrift judge` out of a C++ engine. One header, the standard library alone; C++17.
//
//     kvdrift::Writer writer("traces", "myengine 1.0", "my model", "float32", n_layers);
//     auto pass = writer.prefill("p0", token_ids);            // then writer.decode("p0", token_ids, "as_designed")
//     pass.call(0, n, 0);                                     // start, tokens fed, tokens in the cache before
//     pass.rows("q_rope", layer, {position}, data, {1, n_heads, head_dim}, "BF16");
//     pass.cache("k_cache", layer, position, keys, {n_slots, n_kv_heads, head_dim}, "BF16", slots);
//     writer.add(pass); ... writer.finish();
//
// docs/trace-format.md lists the sites and dtypes, and says what a verdict needs. Values are written as they lie in
// memory, which must be little-endian. Errors are std::runtime_error.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <locale>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kvdrift {

using Ints = std::vector<std::int64_t>;

inline std::string json(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    char escaped[8];
    std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
    out += (c == '"' || c == '\\' || c < 0x20) ? std::string(escaped) : std::string(1, static_cast<char>(c));
  }
  return out + "\"";
}
inline std::string json(std::int64_t value) { return std::to_string(value); }
inline std::string json(double value) {  // in any locale, and to the bit
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out.precision(17);
  if (!(value - value == 0)) throw std::runtime_error("kvdrift: a number is not finite, which JSON cannot hold");
  out << value;
  return out.str();
}
template <typename T>
std::string json(const std::vector<T>& items) {
  std::string out = "[";
  for (std::size_t i = 0; i < items.size(); ++i) out += (i ? "," : "") + json(items[i]);
  return out + "]";
}
inline void append(std::string& items, const std::string& item) { items += (items.empty() ? "" : ",") + item; }

// Bytes of one value; the dtypes are those of docs/trace-format.md, by their names in safetensors.
inline std::size_t width(const std::string& dtype) {
  if (dtype == "F64" || dtype == "I64") return 8;
  if (dtype == "F32") return 4;
  if (dtype == "F16" || dtype == "BF16") return 2;
  if (dtype == "F8_E4M3" || dtype == "F8_E5M2") return 1;
  throw std::runtime_error("kvdrift: unknown dtype " + dtype + "; write F64, F32, F16, BF16, F8_E4M3 or F8_E5M2");
}

// What a rank of an engine that splits its layers holds: heads or columns [first, stop), or, with neither, an addend.
struct Part {
  std::int64_t rank;
  Ints heads = {}, columns = {};
};

// How a layer attends; docs/trace-format.md says what each means.
struct Attention {
  double scale;
  std::optional<double> softcap = {};
  std::optional<std::int64_t> window = {};
  std::vector<double> sinks = {}, slopes = {};
  bool is_biased = false;
};

// One pass over one prompt.
class Pass {
 public:
  Pass(std::string prompt, std::string kind, std::string mode, std::string rung, Ints tokens)
      : prompt_(std::move(prompt)), kind_(std::move(kind)), mode_(std::move(mode)), rung_(std::move(rung)),
        tokens_(std::move(tokens)) {}

  // One forward call as it was made: path proof. kv_len: how many keys attention read; -1 if it is not known.
  void call(std::int64_t start, std::int64_t q_len, std::int64_t cache_len_before, std::int64_t kv_len = -1,
            const std::string& attention = "unknown") {
    append(calls_, "{\"start\":" + json(start) + ",\"q_len\":" + json(q_len) + ",\"cache_len_before\":" +
                       json(cache_len_before) + (kv_len < 0 ? "" : ",\"kv_len\":" + json(kv_len)) + ",\"attention\":" +
                       json(attention) + "}");
  }

  // Values [position, ...] of a site; layer -1 for embed_out, final_norm_out and logits. slots: of attn_scores and
  // attn_probs, the position of each key column where they are not 0, 1, 2 ...
  void rows(const std::string& site, std::int64_t layer, const Ints& positions, const void* data, const Ints& shape,
            const std::string& dtype = "F32", const Ints& slots = {}, const std::optional<Part>& part = {}) {
    if (shape.empty() || shape[0] != static_cast<std::int64_t>(positions.size()))
      throw std::runtime_error("kvdrift: " + site + " has other rows than positions");
    record(site, layer, positions, data, shape, dtype, slots, part);
  }

  // All rows [slot, head, dim] of k_cache or v_cache that attention read for one token; slots: the position of the token
  // that each row belongs to, where they are not 0, 1, 2 ..., as in a ring or in pages.
  void cache(const std::string& site, std::int64_t layer, std::int64_t position, const void* data, const Ints& shape,
             const std::string& dtype = "F32", const Ints& slots = {}, const std::optional<Part>& part = {}) {
    if (shape.size() != 3 || (!slots.empty() && static_cast<std::int64_t>(slots.size()) != shape[0]))
      throw std::runtime_error("kvdrift: " + site + " must be [slot, head, dim] with a position for every slot");
    record(site, layer, {position}, data, shape, dtype, slots, part);
  }

  // How a layer attends. Needed for replay. The second form is short for a scale and a window (0: sees everything).
  void attention(std::int64_t layer, const Attention& how) {
    append(attention_, "{\"layer\":" + json(layer) + ",\"scale\":" + json(how.scale) +
                           (how.softcap ? ",\"softcap\":" + json(*how.softcap) : "") +
                           (how.window ? ",\"window\":" + json(*how.window) : "") +
                           (how.sinks.empty() ? "" : ",\"sinks\":" + json(how.sinks)) +
                           (how.slopes.empty() ? "" : ",\"slopes\":" + json(how.slopes)) +
                           (how.is_biased ? ",\"is_biased\":true" : "") + "}");
  }
  void attention(std::int64_t layer, double scale, std::int64_t window = 0) {
    attention(layer, Attention{scale, {}, window ? std::optional<std::int64_t>(window) : std::nullopt, {}, {}, false});
  }

 private:
  friend class Writer;
  void record(const std::string& site, std::int64_t layer, const Ints& positions, const void* data, const Ints& shape,
              const std::string& dtype, const Ints& slots, const std::optional<Part>& part) {
    const std::string name = json(count_++) + "." + site;
    tensor(name, data, shape, dtype);
    if (!slots.empty()) tensor(name + ".slots", slots.data(), {static_cast<std::int64_t>(slots.size())}, "I64");
    std::string how = slots.empty() ? "" : ",\"slots\":" + json(name + ".slots");
    if (part) {
      how += ",\"rank\":" + json(part->rank);
      if (!part->heads.empty()) how += ",\"heads\":" + json(part->heads);
      if (!part->columns.empty()) how += ",\"columns\":" + json(part->columns);
    }
    append(records_, "{\"tensor\":" + json(name) + ",\"site\":" + json(site) + ",\"layer\":" +
                         (layer < 0 ? "null" : json(layer)) + ",\"positions\":" + json(positions) + how + "}");
  }

  void tensor(const std::string& name, const void* data, const Ints& shape, const std::string& dtype) {
    std::size_t size = width(dtype);
    for (auto n : shape) size *= static_cast<std::size_t>(n);
    if (size == 0) throw std::runtime_error("kvdrift: " + name + " is empty");
    append(header_, json(name) + ":{\"dtype\":" + json(dtype) + ",\"shape\":" + json(shape) + ",\"data_offsets\":[" +
                        std::to_string(data_.size()) + "," + std::to_string(data_.size() + size) + "]}");
    data_.append(static_cast<const char*>(data), size);
  }

  std::string prompt_, kind_, mode_, rung_;
  Ints tokens_;
  std::string header_, data_, records_, calls_, attention_;
  std::int64_t count_ = 0;
};

class Writer {
 public:
  // The directory must be new or empty. facts: further fields of `engine`, such as ",\"model_hash\":\"...\"".
  Writer(std::filesystem::path directory, const std::string& engine, const std::string& model, std::string dtype,
         std::int64_t n_layers, const std::string& facts = "")
      : directory_(std::move(directory)), dtype_(std::move(dtype)) {
    std::filesystem::create_directories(directory_);
    if (!std::filesystem::is_empty(directory_))
      throw std::runtime_error("kvdrift: " + directory_.string() + " is not empty; name a new directory for the traces");
    engine_ = "{\"engine\":" + json(engine) + ",\"model\":" + json(model) + ",\"dtype\":" + json(dtype_) +
              ",\"n_layers\":" + json(n_layers) + facts + "}";
  }

  // Sites that the model does not have, such as q_norm; others that are missing count as not recorded.
  void absent(const std::vector<std::string>& sites) {
    for (const auto& site : sites) append(absent_, json(site));
  }

  // All tokens at once. `rung` is the dtype of this run where it is not that of the engine: float32, float64 ...
  Pass prefill(const std::string& prompt, Ints tokens, const std::string& rung = "") const {
    return Pass(prompt, "prefill", "", rung.empty() ? dtype_ : rung, std::move(tokens));
  }
  // A second prefill of the first ones of the same tokens: what it differs by is the engine's own noise.
  Pass prefill_again(const std::string& prompt, Ints tokens, const std::string& rung = "") const {
    return Pass(prompt, "prefill_again", "", rung.empty() ? dtype_ : rung, std::move(tokens));
  }
  // The last ones of the same tokens, one by one on top of a cache; `mode` is as_designed or kv_aligned.
  Pass decode(const std::string& prompt, Ints tokens, const std::string& mode, const std::string& rung = "") const {
    return Pass(prompt, "decode", mode, rung.empty() ? dtype_ : rung, std::move(tokens));
  }

  // Writes the pass: eight bytes of length, the header, the values.
  void add(const Pass& pass) {
    const std::string name = "pass" + json(count_++), file = name + ".safetensors";
    std::string header = "{" + pass.header_ + "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the values are aligned
    const std::uint64_t length = header.size();
    std::ofstream out(directory_ / file, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), 8).write(header.data(), static_cast<std::streamsize>(length));
    out.write(pass.data_.data(), static_cast<std::streamsize>(pass.data_.size()));
    if (!out.flush()) throw std::runtime_error("kvdrift: cannot write " + (directory_ / file).string());
    append(traces_, "\n{\"name\":" + json(name) + ",\"file\":" + json(file) + ",\"prompt\":" + json(pass.prompt_) +
                        ",\"pass_name\":" + json(pass.kind_) + (pass.mode_.empty() ? "" : ",\"mode\":" + json(pass.mode_)) +
                        ",\"rung\":" + json(pass.rung_) + ",\"tokens\":" + json(pass.tokens_) + ",\"calls\":[" +
                        pass.calls_ + "],\"attention\":[" + pass.attention_ + "],\"records\":[" + pass.records_ + "]}");
  }

  void finish() {
    std::ofstream out(directory_ / "manifest.json");
    out << "{\"format\":\"kvdrift-trace\",\"format_version\":1,\"engine\":" << engine_
        << (absent_.empty() ? "" : ",\"absent\":[" + absent_ + "]") << ",\"traces\":[" << traces_ << "]}\n";
    if (!out.flush()) throw std::runtime_error("kvdrift: cannot write " + (directory_ / "manifest.json").string());
  }

 private:
  std::filesystem::path directory_;
  std::string dtype_, engine_, traces_, absent_;
  std::int64_t count_ = 0;
};

}  // namespace kvdrift
