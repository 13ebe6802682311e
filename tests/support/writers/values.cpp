// What tests/traces/test_writer_files.py writes from Python, from C++: every dtype, slots, parts and attention.
#include "kvdrift_trace.hpp"

template <typename T>
std::vector<T> ramp(std::size_t n, T first, T step) {
  std::vector<T> out;
  for (std::size_t i = 0; i < n; ++i) out.push_back(static_cast<T>(first + static_cast<T>(i) * step));
  return out;
}

int main(int, char** argv) {
  try {
    kvdrift::Writer writer(argv[1], "e \"q\" \\ \n", "m", "bfloat16", 2, ",\"model_hash\":\"abc\"");
    writer.absent({"q_norm", "k_norm"});
    for (const std::string kind : {"prefill", "prefill_again", "decode"}) {
      auto pass = kind == "prefill"         ? writer.prefill("p", {5, 6, 7, 8})
                  : kind == "prefill_again" ? writer.prefill_again("p", {5, 6, 7, 8})
                                            : writer.decode("p", {5, 6, 7, 8}, "as_designed");
      if (kind == "decode") pass.call(3, 1, 3, 4);
      else pass.call(0, 4, 0, 4);
      pass.attention(0, {0.1, 30.5, 3, {0.25, -1e-7}, {0.5, 0.25}, false});
      pass.attention(1, 0.125);
      const auto f64 = ramp<double>(6, -1.25, 0.5);
      const auto f32 = ramp<float>(6, -1.25f, 0.5f);
      const auto half = ramp<std::uint16_t>(6, 0x3c00, 1);
      const auto byte = ramp<std::uint8_t>(6, 0x30, 1);
      pass.rows("embed_out", -1, {3}, f64.data(), {1, 6}, "F64");
      pass.rows("layer_in", 0, {3}, f32.data(), {1, 6});
      pass.rows("q_proj", 0, {3}, half.data(), {1, 6}, "F16");
      pass.rows("q_rope", 0, {3}, half.data(), {1, 3, 2}, "BF16");
      pass.cache("k_cache", 0, 3, byte.data(), {3, 1, 2}, "F8_E4M3", {3, 1, 2});
      pass.cache("v_cache", 0, 3, byte.data(), {3, 1, 2}, "F8_E5M2", {3, 1, 2});
      pass.cache("k_cache", 1, 3, half.data(), {3, 1, 2}, "BF16");
      pass.rows("attn_probs", 0, {3}, f32.data(), {1, 2, 3}, "F32", {3, 1, 2});
      pass.rows("attn_ctx", 0, {3}, f32.data(), {1, 3, 1}, "F32", {}, kvdrift::Part{0, {0, 3}});
      pass.rows("attn_ctx", 0, {3}, f32.data() + 3, {1, 3, 1}, "F32", {}, kvdrift::Part{1, {3, 6}});
      pass.rows("mlp_out", 0, {3}, f32.data(), {1, 3}, "F32", {}, kvdrift::Part{0, {}, {0, 3}});
      pass.rows("mlp_out", 0, {3}, f32.data() + 3, {1, 3}, "F32", {}, kvdrift::Part{1, {}, {3, 6}});
      pass.rows("attn_out", 0, {3}, f32.data(), {1, 6}, "F32", {}, kvdrift::Part{0});
      pass.rows("attn_out", 0, {3}, f32.data(), {1, 6}, "F32", {}, kvdrift::Part{1});
      writer.add(pass);
    }
    writer.finish();
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
