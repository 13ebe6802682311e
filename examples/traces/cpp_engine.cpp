// A one-layer attention engine in C++ that writes traces for `kvdrift judge`.
//
//     c++ -std=c++17 -O1 examples/traces/cpp_engine.cpp -o cpp_engine && ./cpp_engine traces [scale|stale]
//     kvdrift judge traces
//
// The same code runs at float and at double, which gives `judge` its precision ladder. Prefill sums the keys from the
// first to the last, decode from the last to the first, so that the two round differently.
#include <algorithm>
#include <cmath>

#include "kvdrift_trace.hpp"

namespace {

constexpr std::int64_t kHeads = 4, kKvHeads = 2, kDim = 8, kWidth = kHeads * kDim, kVocab = 50;

// Small reproducible weights: the low bits of a linear congruential generator.
template <typename T>
std::vector<T> weights(std::uint32_t seed, std::size_t n, double size) {
  std::vector<T> out(n);
  for (auto& value : out) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<T>((static_cast<double>(seed >> 8) / (1 << 23) - 1.0) * size);
  }
  return out;
}

template <typename T>
struct Engine {
  std::vector<T> embedding = weights<T>(1, kVocab * kWidth, 1.0), wq = weights<T>(2, kWidth * kWidth, 0.6),
                 wk = weights<T>(3, kWidth * kKvHeads * kDim, 0.6), wv = weights<T>(4, kWidth * kKvHeads * kDim, 0.6);
  std::vector<T> keys, values;  // the cache, [slot, kv head, dim]
  std::string bug;
  const char* dtype = sizeof(T) == 4 ? "F32" : "F64";

  // Feeds one token on top of the cache and records it.
  void step(std::int64_t token, std::int64_t position, bool decoding, kvdrift::Pass* out) {
    const T* x = &embedding[token * kWidth];
    const auto q = product(x, wq, kWidth, decoding), k = product(x, wk, kKvHeads * kDim, decoding),
               v = product(x, wv, kKvHeads * kDim, decoding);
    keys.insert(keys.end(), k.begin(), k.end());
    values.insert(values.end(), v.begin(), v.end());
    if (decoding && bug == "stale") std::copy_n(keys.begin(), kKvHeads * kDim, keys.begin() + kKvHeads * kDim);
    const double scale = 1.0 / std::sqrt(double(kDim)) * (decoding && bug == "scale" ? 1.01 : 1.0);
    const auto context = attend(q, position, T(scale), decoding);
    if (!out) return;
    std::vector<T> handed_on(x, x + kWidth), logits(kVocab, T(0));
    for (std::int64_t j = 0; j < kWidth; ++j) handed_on[j] += context[j];
    for (std::int64_t step = 0; step < kWidth; ++step) {
      const std::int64_t j = decoding ? kWidth - 1 - step : step;
      for (std::int64_t id = 0; id < kVocab; ++id) logits[id] += handed_on[j] * embedding[id * kWidth + j];
    }
    const std::int64_t slots = position + 1;
    out->rows("embed_out", -1, {position}, x, {1, kWidth}, dtype);
    out->rows("q_proj", 0, {position}, q.data(), {1, kWidth}, dtype);
    out->rows("q_rope", 0, {position}, q.data(), {1, kHeads, kDim}, dtype);  // this engine has no rotation
    out->rows("k_proj", 0, {position}, k.data(), {1, kKvHeads * kDim}, dtype);
    out->rows("v_proj", 0, {position}, v.data(), {1, kKvHeads * kDim}, dtype);
    out->cache("k_cache", 0, position, keys.data(), {slots, kKvHeads, kDim}, dtype);
    out->cache("v_cache", 0, position, values.data(), {slots, kKvHeads, kDim}, dtype);
    out->rows("attn_ctx", 0, {position}, context.data(), {1, kHeads, kDim}, dtype);
    out->rows("layer_out", 0, {position}, handed_on.data(), {1, kWidth}, dtype);
    out->rows("logits", -1, {position}, logits.data(), {1, kVocab}, dtype);
  }

  std::vector<T> product(const T* x, const std::vector<T>& w, std::int64_t n, bool decoding) const {
    std::vector<T> out(n, T(0));
    for (std::int64_t step = 0; step < kWidth; ++step) {
      const std::int64_t i = decoding ? kWidth - 1 - step : step;
      for (std::int64_t j = 0; j < n; ++j) out[j] += x[i] * w[i * n + j];
    }
    return out;
  }

  std::vector<T> attend(const std::vector<T>& q, std::int64_t position, T scale, bool decoding) const {
    std::vector<T> out(kWidth, T(0));
    for (std::int64_t h = 0; h < kHeads; ++h) {
      const std::int64_t kv = h / (kHeads / kKvHeads);
      std::vector<T> scores(position + 1);
      T top = -INFINITY, total = 0;
      for (std::int64_t s = 0; s <= position; ++s) {
        T dot = 0;
        for (std::int64_t d = 0; d < kDim; ++d) dot += q[h * kDim + d] * keys[(s * kKvHeads + kv) * kDim + d];
        scores[s] = dot * scale;
        top = std::max(top, scores[s]);
      }
      for (auto& score : scores) total += score = std::exp(score - top);
      for (std::int64_t step = 0; step <= position; ++step) {
        const std::int64_t s = decoding ? position - step : step;
        for (std::int64_t d = 0; d < kDim; ++d)
          out[h * kDim + d] += scores[s] / total * values[(s * kKvHeads + kv) * kDim + d];
      }
    }
    return out;
  }
};

template <typename T>
void run(kvdrift::Writer& writer, const std::string& name, const std::vector<std::int64_t>& tokens,
         const std::string& rung, const std::string& bug) {
  const auto n = static_cast<std::int64_t>(tokens.size()), first = n - 2;  // the last two tokens are decoded
  for (const std::string mode : {"", "as_designed", "kv_aligned"}) {
    Engine<T> engine;
    engine.bug = bug;
    const bool decoding = !mode.empty();
    auto pass = decoding ? writer.decode(name, tokens, mode, rung) : writer.prefill(name, tokens, rung);
    pass.attention(0, 1.0 / std::sqrt(double(kDim)));
    if (!decoding) pass.call(0, n, 0);
    for (std::int64_t t = 0; t < n; ++t) {
      const bool probed = t >= first;
      if (decoding && probed) pass.call(t, 1, t);
      engine.step(tokens[t], t, decoding && probed, probed ? &pass : nullptr);
      if (mode == "kv_aligned" && probed) {  // the next step reads the row that prefill writes for this token
        engine.keys.resize(t * kKvHeads * kDim);
        engine.values.resize(t * kKvHeads * kDim);
        engine.step(tokens[t], t, false, nullptr);
      }
    }
    writer.add(pass);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: cpp_engine DIRECTORY [scale|stale]\n"), 2;
  const std::string bug = argc > 2 ? argv[2] : "";
  try {
    kvdrift::Writer writer(argv[1], "cpp_engine", "one attention layer", "float32", 1);
    run<float>(writer, "a", {3, 14, 15, 9, 26, 5}, "float32", bug);
    run<float>(writer, "b", {2, 7, 18, 28}, "float32", bug);
    run<double>(writer, "a", {3, 14, 15, 9, 26, 5}, "float64", bug);
    run<double>(writer, "b", {2, 7, 18, 28}, "float64", bug);
    writer.finish();
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "cpp_engine: %s\n", error.what()), 1;
  }
}
