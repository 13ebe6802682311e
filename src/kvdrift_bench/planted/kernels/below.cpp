// Kernels of a decode step as an engine compiles them: float32 inside, whatever the dtype of the model is. None of this is
// seen from Python. Arrays are dense, last axis fastest. `defect` is 0 in a correct kernel, else one of the numbers below.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Defect {
    NONE = 0,
    TAIL_SKIPPED = 1,    // the last, incomplete tile of the inner axis is never reached
    PEAK_STALE = 2,      // what was summed under an older maximum is not rescaled
    SPLIT_DROPPED = 3,   // the last split is not merged
    WRONG_BASE = 4,      // log-sums of base 2 are taken for natural ones
    ONE_HEAD_ROW = 5,    // head 1 leaves its first key out where the number of keys is even
    SCALE = 6,           // scores are too large by 1 %
    ONE_OUTPUT = 7,      // output 3 is too large by 5 % of the largest one
    PAGE_STALE = 8,      // the last entry of the block table still names the page before
    GROUP_SHIFTED = 9,   // the last group of a row is scaled with the factor of the group before
    TILE_WEIGHT = 10,    // the second tile enters the sum of weights and not the output
    EPSILON = 11,        // the epsilon of a norm is a thousand times too large
    ONE_ELEMENT = 12,    // the last element of each row is not written, and holds the one before
};

const float LOG2_E = 1.4426950408889634f;

struct Shape {
    int64_t heads, kv_heads, rows, keys, dim, values;
    float scale;
};

// A score: product of a query and a key, scaled, and the mask [rows, keys] added, if there is one.
float score(const float* q, const float* k, int64_t dim, float scale, const float* mask, int64_t key) {
    float sum = 0.0f;
    for (int64_t i = 0; i < dim; ++i) sum += q[i] * k[i];
    return sum * scale + (mask ? mask[key] : 0.0f);
}

float bf16(float x) {  // rounded to bfloat16, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits += 0x7fff + ((bits >> 16) & 1);
    bits &= 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

float from_bf16(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint16_t to_bf16(float x) {
    x = bf16(x);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t(bits >> 16);
}

// Sum of products in four lanes, as vector registers do it; `tile` is how many elements are taken at a time.
float dot(const float* a, const float* b, int64_t n, int64_t tile, bool kahan, int defect) {
    if (defect == TAIL_SKIPPED) n -= n % tile;
    if (kahan) {
        float sum = 0.0f, lost = 0.0f;
        for (int64_t i = 0; i < n; ++i) {
            float term = a[i] * b[i] - lost, next = sum + term;
            lost = (next - sum) - term;
            sum = next;
        }
        return sum;
    }
    float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int lane = 0; lane < 4; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
    for (; i < n; ++i) lanes[0] += a[i] * b[i];
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// Output number 3 of each row, or the last one, as a defect wants it.
void spoil(float* y, int64_t outputs, int defect) {
    if (defect == ONE_OUTPUT) {
        float most = 0.0f;
        for (int64_t o = 0; o < outputs; ++o) most = std::max(most, std::fabs(y[o]));
        y[3] += 0.05f * most;
    }
    if (defect == ONE_ELEMENT) y[outputs - 1] = y[outputs - 2];
}

}  // namespace

extern "C" {

// Attention tile by tile with a running maximum. `backwards`: from the last key to the first. `lazy`: the maximum is moved
// only where it grew by more than that many powers of two. `base2`: queries are scaled by log2(e), and exp2 is taken.
void tiled_attention(const float* q, const float* k, const float* v, const float* mask, float* out, const Shape* shape,
                     int64_t tile, int backwards, float lazy, int base2, int defect) {
    const Shape& s = *shape;
    const int64_t group = s.heads / s.kv_heads, n_tiles = (s.keys + tile - 1) / tile;
    std::vector<float> query(s.dim), weights(tile), total(s.values);
    for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t r = 0; r < s.rows; ++r) {
            const float* hidden = mask ? mask + r * s.keys : nullptr;
            const float scale = (defect == SCALE ? 1.01f : 1.0f) * s.scale;
            for (int64_t i = 0; i < s.dim; ++i)
                query[i] = q[(h * s.rows + r) * s.dim + i] * (base2 ? scale * LOG2_E : 1.0f);
            float peak = -3.0e38f, sum = 0.0f;
            std::fill(total.begin(), total.end(), 0.0f);
            for (int64_t t = 0; t < n_tiles; ++t) {
                const int64_t which = backwards ? n_tiles - 1 - t : t;
                const int64_t start = which * tile, stop = std::min(start + tile, s.keys);
                if (defect == TAIL_SKIPPED && stop - start < tile && n_tiles > 1) continue;
                float most = -3.0e38f;
                for (int64_t j = start; j < stop; ++j) {
                    const float* key = k + ((h / group) * s.keys + j) * s.dim;
                    float x = score(query.data(), key, s.dim, base2 ? 1.0f : scale, hidden, j);
                    if (defect == ONE_HEAD_ROW && h == 1 && j == 0 && s.keys % 2 == 0 && s.rows == 1) x = -3.0e38f;
                    weights[j - start] = x;
                    most = std::max(most, x);
                }
                const float limit = lazy > 0.0f ? lazy / (base2 ? 1.0f : LOG2_E) : 0.0f;
                const float next = most > peak + limit || t == 0 ? std::max(peak, most) : peak;
                float fade = base2 ? std::exp2(peak - next) : std::exp(peak - next);
                if (defect == PEAK_STALE && t == 1) fade = 1.0f;
                sum *= fade;
                for (auto& x : total) x *= fade;
                for (int64_t j = start; j < stop; ++j) {
                    const float w = base2 ? std::exp2(weights[j - start] - next) : std::exp(weights[j - start] - next);
                    sum += w;
                    if (defect == TILE_WEIGHT && which == 1) continue;
                    const float* value = v + ((h / group) * s.keys + j) * s.values;
                    for (int64_t i = 0; i < s.values; ++i) total[i] += w * value[i];
                }
                peak = next;
            }
            for (int64_t i = 0; i < s.values; ++i) out[(h * s.rows + r) * s.values + i] = total[i] / sum;
        }
}

// Split-K: each part of the keys yields a normalised output and a log-sum; `merge` 0: by exp, 1: by log2 and exp2, 2: by a
// softmax over the parts.
void split_attention(const float* q, const float* k, const float* v, const float* mask, float* out, const Shape* shape,
                     int64_t parts, int64_t merge, int defect) {
    const Shape& s = *shape;
    const int64_t group = s.heads / s.kv_heads;
    parts = std::max<int64_t>(1, std::min(parts, s.keys));
    std::vector<float> partial(parts * s.values), sums(parts), x;
    for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t r = 0; r < s.rows; ++r) {
            const float* hidden = mask ? mask + r * s.keys : nullptr;
            std::fill(partial.begin(), partial.end(), 0.0f);
            for (int64_t p = 0; p < parts; ++p) {
                const int64_t start = s.keys * p / parts, stop = s.keys * (p + 1) / parts;
                x.assign(stop - start, 0.0f);
                float peak = -3.0e38f, sum = 0.0f;
                for (int64_t j = start; j < stop; ++j) {
                    x[j - start] = score(q + (h * s.rows + r) * s.dim, k + ((h / group) * s.keys + j) * s.dim, s.dim,
                                         s.scale, hidden, j);
                    peak = std::max(peak, x[j - start]);
                }
                for (int64_t j = start; j < stop; ++j) sum += (x[j - start] = std::exp(x[j - start] - peak));
                sums[p] = -3.0e38f;
                if (sum == 0.0f) continue;  // the mask hides all of this part
                for (int64_t j = start; j < stop; ++j)
                    for (int64_t i = 0; i < s.values; ++i)
                        partial[p * s.values + i] += x[j - start] / sum * v[((h / group) * s.keys + j) * s.values + i];
                sums[p] = merge == 1 ? peak * LOG2_E + std::log2(sum) : peak + std::log(sum);
            }
            const int64_t taken = defect == SPLIT_DROPPED && parts > 1 ? parts - 1 : parts;
            const float top = *std::max_element(sums.begin(), sums.begin() + taken);
            std::vector<float> weights(taken);
            float whole = 0.0f;
            for (int64_t p = 0; p < taken; ++p) {
                const bool two = merge == 1 && defect != WRONG_BASE;
                whole += (weights[p] = two ? std::exp2(sums[p] - top) : std::exp(sums[p] - top));
            }
            if (merge == 2)  // normalised first, as a softmax over the parts hands them out
                for (auto& w : weights) w /= whole;
            for (int64_t i = 0; i < s.values; ++i) {
                float total = 0.0f;
                for (int64_t p = 0; p < taken; ++p) total += weights[p] * partial[p * s.values + i];
                out[(h * s.rows + r) * s.values + i] = merge == 2 ? total : total / whole;
            }
        }
}

// Attention over pages [page, slot, kv head, dim], found by a block table, one running maximum for all of them.
void paged_attention(const float* q, const float* k, const float* v, const int32_t* table, const float* mask, float* out,
                     const Shape* shape, int64_t slots, int defect) {
    const Shape& s = *shape;
    const int64_t group = s.heads / s.kv_heads, n_pages = (s.keys + slots - 1) / slots;
    std::vector<float> total(s.values);
    for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t r = 0; r < s.rows; ++r) {
            const float* hidden = mask ? mask + r * s.keys : nullptr;
            float peak = -3.0e38f, sum = 0.0f;
            std::fill(total.begin(), total.end(), 0.0f);
            for (int64_t j = 0; j < s.keys; ++j) {
                int64_t entry = j / slots;
                if (defect == PAGE_STALE && n_pages > 1 && entry == n_pages - 1) entry -= 1;
                const int64_t place = (table[entry] * slots + j % slots) * s.kv_heads + h / group;
                const float x = score(q + (h * s.rows + r) * s.dim, k + place * s.dim, s.dim, s.scale, hidden, j);
                const float next = std::max(peak, x), fade = std::exp(peak - next), w = std::exp(x - next);
                sum = sum * fade + w;
                for (int64_t i = 0; i < s.values; ++i) total[i] = total[i] * fade + w * v[place * s.values + i];
                peak = next;
            }
            for (int64_t i = 0; i < s.values; ++i) out[(h * s.rows + r) * s.values + i] = total[i] / sum;
        }
}

// A kernel for bfloat16 alone: operands and output are its bits, weights are rounded to it before they meet the values.
void half_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, const float* mask, uint16_t* out,
                    const Shape* shape, int defect) {
    const Shape& s = *shape;
    const int64_t group = s.heads / s.kv_heads;
    std::vector<float> x(s.keys);
    for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t r = 0; r < s.rows; ++r) {
            const float* hidden = mask ? mask + r * s.keys : nullptr;
            float peak = -3.0e38f, sum = 0.0f;
            for (int64_t j = 0; j < s.keys; ++j) {
                float product = 0.0f;
                for (int64_t i = 0; i < s.dim; ++i)
                    product += from_bf16(q[(h * s.rows + r) * s.dim + i]) *
                               from_bf16(k[((h / group) * s.keys + j) * s.dim + i]);
                x[j] = product * s.scale * (defect == SCALE ? 1.01f : 1.0f) + (hidden ? hidden[j] : 0.0f);
                peak = std::max(peak, x[j]);
            }
            for (auto& each : x) sum += (each = std::exp(each - peak));
            if (defect == TAIL_SKIPPED && s.keys % 8) std::fill(x.end() - s.keys % 8, x.end(), 0.0f);
            for (int64_t i = 0; i < s.values; ++i) {
                float total = 0.0f;
                for (int64_t j = 0; j < s.keys; ++j)
                    total += bf16(x[j]) * from_bf16(v[((h / group) * s.keys + j) * s.values + i]);
                out[(h * s.rows + r) * s.values + i] = to_bf16(total / sum);
            }
        }
}

// y [rows, outputs] = x [rows, inner] w [outputs, inner]^T.
void gemv(const float* x, const float* w, float* y, int64_t rows, int64_t outputs, int64_t inner, int kahan, int defect) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < outputs; ++o)
            y[r * outputs + o] = dot(x + r * inner, w + o * inner, inner, 24, kahan, defect);
        spoil(y + r * outputs, outputs, defect);
    }
}

// Packed weights: codes of `bits` 8 or 4 (two to a byte, the lower half first), with one factor for each `group` of inputs.
void gemv_packed(const float* x, const int8_t* w, const float* factors, float* y, int64_t rows, int64_t outputs,
                 int64_t inner, int64_t group, int64_t bits, int defect) {
    const int64_t groups = inner / group;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < outputs; ++o) {
            float total = 0.0f;
            for (int64_t g = 0; g < groups; ++g) {
                float sum = 0.0f;
                for (int64_t i = g * group; i < (g + 1) * group; ++i) {
                    int code;
                    if (bits == 8) {
                        code = w[o * inner + i];
                    } else {
                        const uint8_t both = uint8_t(w[(o * inner + i) / 2]);
                        code = int(i % 2 ? both >> 4 : both & 15) - 8;
                    }
                    sum += x[r * inner + i] * float(code);
                }
                const bool shifted = defect == GROUP_SHIFTED && g == groups - 1;
                const int64_t place = shifted ? std::max<int64_t>(0, o * groups + g - 1) : o * groups + g;
                total += sum * factors[place];
            }
            y[r * outputs + o] = total;
        }
        spoil(y + r * outputs, outputs, defect);
    }
}

// Root mean square of a row in one pass, by a reciprocal root; the weight is multiplied in float32.
void rms_norm(const float* x, const float* w, float* y, int64_t rows, int64_t width, float epsilon, int defect) {
    if (defect == EPSILON) epsilon *= 1000.0f;
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = x + r * width;
        const float mean = dot(row, row, width, 4, false, NONE) / float(width);
        const float factor = 1.0f / std::sqrt(mean + epsilon);
        for (int64_t i = 0; i < width; ++i) y[r * width + i] = row[i] * factor * w[i];
        if (defect == ONE_ELEMENT) y[(r + 1) * width - 1] = y[(r + 1) * width - 2];
    }
}

// Rotation of pairs that lie half a head apart, in place; cos and sin are [rows, dim].
void rotate(float* x, const float* cos, const float* sin, int64_t heads, int64_t rows, int64_t dim, int defect) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r) {
            float* row = x + (h * rows + r) * dim;
            for (int64_t i = 0; i < (defect == TAIL_SKIPPED ? half - 1 : half); ++i) {
                const float a = row[i], b = row[i + half];
                row[i] = a * cos[r * dim + i] - b * sin[r * dim + i];
                row[i + half] = b * cos[r * dim + i + half] + a * sin[r * dim + i + half];
            }
        }
}

// silu(gate) * up in float32.
void gated(const float* gate, const float* up, float* out, int64_t n, int defect) {
    for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    if (defect == ONE_ELEMENT) out[n - 1] = out[n - 2];
}

}  // extern "C"
