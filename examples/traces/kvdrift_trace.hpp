// Writes traces for `kvdrift judge` out of a C++ engine. One header, the standard library alone; C++17.
//
//     kvdrift::Writer writer("traces", "myengine 1.0", "my model", "float32", n_layers);
//     auto pass = writer.prefill("p0", token_ids);            // then writer.decode("p0", token_ids, "as_designed")
//     pass.call(0, n, 0);                                     // start, tokens fed, tokens in the cache before
//     pass.rows("q_rope", layer, {position}, data, {1, n_heads, head_dim});
//     pass.cache("k_cache", layer, position, keys, {n_slots, n_kv_heads, head_dim});
//     writer.add(pass); ... writer.finish();
//
// docs/trace-format.md lists the sites, and says what a verdict needs. Values are written as they lie in memory, which
// must be little-endian. Errors are std::runtime_error.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvdrift {

using Shape = std::vector<std::int64_t>;

inline std::string json_text(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    char escaped[8];
    std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
    out += (c == '"' || c == '\\' || c < 0x20) ? std::string(escaped) : std::string(1, static_cast<char>(c));
  }
  return out + "\"";
}

template <typename T>
std::string list(const std::vector<T>& items) {
  std::string out = "[";
  for (std::size_t i = 0; i < items.size(); ++i) out += (i ? "," : "") + std::to_string(items[i]);
  return out + "]";
}

// One pass over one prompt. `dtype` is a name of safetensors: F32, F16, BF16, F64.
class Pass {
 public:
  Pass(std::string prompt, std::string kind, std::string mode, std::string rung, std::vector<std::int64_t> tokens)
      : prompt_(std::move(prompt)), kind_(std::move(kind)), mode_(std::move(mode)), rung_(std::move(rung)),
        tokens_(std::move(tokens)) {}

  // One forward call as it was made: path proof.
  void call(std::int64_t start, std::int64_t q_len, std::int64_t cache_len_before) {
    calls_ += (calls_.empty() ? "" : ",") + std::string("{\"start\":") + std::to_string(start) +
              ",\"q_len\":" + std::to_string(q_len) + ",\"cache_len_before\":" + std::to_string(cache_len_before) + "}";
  }

  // Values [position, ...] of a site; layer -1 for embed_out, final_norm_out and logits.
  void rows(const std::string& site, std::int64_t layer, const std::vector<std::int64_t>& positions, const void* data,
            const Shape& shape, const std::string& dtype = "F32") {
    const std::string name = std::to_string(count_++) + "." + site;
    std::size_t size = dtype == "F64" ? 8 : dtype == "F32" ? 4 : 2;
    for (auto n : shape) size *= static_cast<std::size_t>(n);
    header_ += (header_.empty() ? "" : ",") + json_text(name) + ":{\"dtype\":" + json_text(dtype) + ",\"shape\":" +
               list(shape) + ",\"data_offsets\":[" + std::to_string(data_.size()) + "," +
               std::to_string(data_.size() + size) + "]}";
    data_.append(static_cast<const char*>(data), size);
    records_ += (records_.empty() ? "" : ",") + std::string("{\"tensor\":") + json_text(name) + ",\"site\":" +
                json_text(site) + ",\"layer\":" + (layer < 0 ? "null" : std::to_string(layer)) + ",\"positions\":" +
                list(positions) + "}";
  }

  // All rows [slot, head, dim] of k_cache or v_cache that attention read for one token; slot i is position i.
  void cache(const std::string& site, std::int64_t layer, std::int64_t position, const void* data, const Shape& shape,
             const std::string& dtype = "F32") {
    rows(site, layer, {position}, data, shape, dtype);
  }

  // How a layer attends: the factor of q.k, and the window (0: sees everything). Needed for replay.
  void attention(std::int64_t layer, double scale, std::int64_t window = 0) {
    char number[32];
    std::snprintf(number, sizeof number, "%.17g", scale);
    attention_ += (attention_.empty() ? "" : ",") + std::string("{\"layer\":") + std::to_string(layer) +
                  ",\"scale\":" + number + (window ? ",\"window\":" + std::to_string(window) : "") + "}";
  }

 private:
  friend class Writer;
  std::string prompt_, kind_, mode_, rung_;
  std::vector<std::int64_t> tokens_;
  std::string header_, data_, records_, calls_, attention_;
  int count_ = 0;
};

class Writer {
 public:
  Writer(std::filesystem::path directory, const std::string& engine, const std::string& model, std::string dtype,
         std::int64_t n_layers)
      : directory_(std::move(directory)), dtype_(std::move(dtype)) {
    std::filesystem::create_directories(directory_);
    engine_ = "{\"engine\":" + json_text(engine) + ",\"model\":" + json_text(model) + ",\"dtype\":" + json_text(dtype_) +
              ",\"n_layers\":" + std::to_string(n_layers) + "}";
  }

  // All tokens at once. `rung` is the dtype of this run where it is not that of the engine: float32, float64 ...
  Pass prefill(const std::string& prompt, std::vector<std::int64_t> tokens, const std::string& rung = "") {
    return Pass(prompt, "prefill", "", rung.empty() ? dtype_ : rung, std::move(tokens));
  }
  // The last ones of the same tokens, one by one on top of a cache; `mode` is as_designed or kv_aligned.
  Pass decode(const std::string& prompt, std::vector<std::int64_t> tokens, const std::string& mode,
              const std::string& rung = "") {
    return Pass(prompt, "decode", mode, rung.empty() ? dtype_ : rung, std::move(tokens));
  }

  // Writes the pass: eight bytes of length, the header, the values.
  void add(const Pass& pass) {
    const std::string name = "pass" + std::to_string(count_++), file = name + ".safetensors";
    const std::string header = "{" + pass.header_ + "}";
    const std::uint64_t length = header.size();
    std::ofstream out(directory_ / file, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), 8).write(header.data(), static_cast<std::streamsize>(length));
    out.write(pass.data_.data(), static_cast<std::streamsize>(pass.data_.size()));
    if (!out.flush()) throw std::runtime_error("cannot write " + (directory_ / file).string());
    traces_ += (traces_.empty() ? "" : ",\n") + std::string("{\"name\":") + json_text(name) + ",\"file\":" + json_text(file) +
               ",\"prompt\":" + json_text(pass.prompt_) + ",\"pass_name\":" + json_text(pass.kind_) +
               (pass.mode_.empty() ? "" : ",\"mode\":" + json_text(pass.mode_)) + ",\"rung\":" + json_text(pass.rung_) +
               ",\"tokens\":" + list(pass.tokens_) + ",\"calls\":[" + pass.calls_ + "],\"attention\":[" +
               pass.attention_ + "],\"records\":[" + pass.records_ + "]}";
  }

  void finish() {
    std::ofstream out(directory_ / "manifest.json");
    out << "{\"format\":\"kvdrift-trace\",\"format_version\":1,\"engine\":" << engine_ << ",\"traces\":[" << traces_ << "]}\n";
    if (!out.flush()) throw std::runtime_error("cannot write " + (directory_ / "manifest.json").string());
  }

 private:
  std::filesystem::path directory_;
  std::string dtype_, engine_, traces_;
  int count_ = 0;
};

}  // namespace kvdrift
