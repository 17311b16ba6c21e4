// Float rows to ggml's K-quant blocks: 256 weights in sub-blocks, each with a scale (and a minimum) of a few bits.
//
// The algorithm, and every float operation's order, is that of `halfbyte/quant/gguf_encode.py`, which says what is
// done and why; the bytes are the same. Sub-blocks lie side by side (a lane each), so that all loops are vertical and
// no sum's order depends on the vector width. Compiled without contraction, like the other block formats.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/engine.h"
#include "engine/export.h"

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

namespace hb {
namespace {

constexpr int block_size = 256;

// As many floats as the instruction set of `encode_*` below has in a register; written with GCC's and Clang's extension.
template <int L>
struct Vectors {
  typedef float F __attribute__((vector_size(4 * L)));
  typedef int32_t I __attribute__((vector_size(4 * L)));
};

// In place, because a vector that is returned has an ABI, and GCC warns of it even where all is inlined.
template <class F>
INLINE void clamp(F& value, float low, float high) {
  value = value < low ? F{} + low : value;
  value = value > high ? F{} + high : value;
}

// To the nearest code from `low` to `high`. 1.5 * 2^23 has steps of 1: adding it rounds half to even.
template <class F>
INLINE void to_code(F& value, float low, float high) {
  clamp(value, low, high);
  value = (value + 12582912.0f) - 12582912.0f;
}

INLINE float rounded_to_half(float value) { return Float16::read(Float16::write(value)); }

// Eight sub-blocks side by side, in vectors of L.
template <int L, int size>
struct Columns {
  typename Vectors<L>::F at[size][8 / L];
};

template <int L, int size>
INLINE void gather(const float* x, Columns<L, size>& columns) {
  for (int i = 0; i < size; i++) {
    for (int lane = 0; lane < 8; lane++) columns.at[i][lane / L][lane % L] = x[lane * size + i];
  }
}

// Scale and minimum of L sub-blocks of 32: x is about scale * code - minimum, code from 0 to `top`.
template <int L, int top>
INLINE void fit_affine(const Columns<L, 32>& columns, int part, float* scales, float* minima) {
  using F = typename Vectors<L>::F;
  using I = typename Vectors<L>::I;
  constexpr float first = top == 15 ? -1.0f : -0.5f;
  constexpr int steps = top == 15 ? 21 : 16;
  const F zero{}, one = zero + 1.0f;
  F low = zero, high = columns.at[0][part], squares = zero, w[32], z[32];
  for (int i = 0; i < 32; i++) {
    const F x = columns.at[i][part];
    low = x < low ? x : low;
    high = x > high ? x : high;
    squares += x * x;
  }
  squares *= 0.03125f;
  for (int l = 0; l < L; l++) squares[l] = std::sqrt(squares[l]);
  const F range = high - low;
  F sum_w = zero, sum_wz = zero;
  for (int i = 0; i < 32; i++) {
    const F x = columns.at[i][part];
    w[i] = squares + (F)((I)x & 0x7fffffff);
    z[i] = x - low;
    sum_w += w[i];
    sum_wz += w[i] * z[i];
  }
  F best = zero, scale = range * (1.0f / top), offset = zero;
  for (int step = 0; step < steps + 2; step++) {
    const float levels = float(top) + (first + 0.1f * float(step));
    F inverse = range > 0 ? levels / (range > 0 ? range : one) : zero;
    if (step >= steps) inverse = scale != 0 ? 1.0f / (scale != 0 ? scale : one) : zero;
    F sum_wc = zero, sum_wcc = zero, sum_wcz = zero;
    for (int i = 0; i < 32; i++) {
      F code = inverse * (z[i] - offset);
      to_code(code, 0.0f, float(top));
      const F wc = w[i] * code;
      sum_wc += wc;
      sum_wcc += wc * code;
      sum_wcz += wc * z[i];
    }
    const F product = sum_w * sum_wcc;
    const F determinant = product - sum_wc * sum_wc;
    const I solvable = determinant > product * 1e-5f;
    const F divisor = solvable ? determinant : one;
    F s = (sum_w * sum_wcz - sum_wz * sum_wc) / divisor;
    F o = (sum_wcc * sum_wz - sum_wc * sum_wcz) / divisor;
    // A minimum below zero cannot be stored: then the line goes through the origin.
    const I above = low + o > 0;
    s = above ? (sum_wcz + low * sum_wc) / (solvable ? sum_wcc : one) : s;
    o = above ? -low : o;
    const F linear = 2.0f * (s * sum_wcz + o * sum_wz);
    const F gain = linear - ((s * s) * sum_wcc + (2.0f * (s * o)) * sum_wc + (o * o) * sum_w);
    const I better = solvable & (gain > best);
    best = better ? gain : best;
    scale = better ? s : scale;
    offset = better ? o : offset;
  }
  for (int l = 0; l < L; l++) {
    scales[l] = scale[l] > 0 ? scale[l] : 0.0f;
    const float minimum = -(low[l] + offset[l]);
    minima[l] = minimum > 0 ? minimum : 0.0f;
  }
}

// The scales of L sub-blocks of 16: x is about scale * code, code from -32 to 31, the scale of either sign.
template <int L>
INLINE void fit_symmetric(const Columns<L, 16>& columns, int part, float* scales) {
  using F = typename Vectors<L>::F;
  using I = typename Vectors<L>::I;
  const F zero{}, one = zero + 1.0f;
  F extreme = zero, magnitude = zero, best = zero, scale = zero;
  for (int i = 0; i < 16; i++) {
    const F x = columns.at[i][part], size = (F)((I)x & 0x7fffffff);
    extreme = size > magnitude ? x : extreme;
    magnitude = size > magnitude ? size : magnitude;
  }
  const I any = magnitude > 0;
  for (int step = 0; step < 19; step++) {
    const float levels = -(32.0f + (-0.9f + 0.1f * float(step)));
    const F inverse = any ? levels / (any ? extreme : one) : zero;
    F sum_wcx = zero, sum_wcc = zero;
    for (int i = 0; i < 16; i++) {
      const F x = columns.at[i][part];
      F code = inverse * x;
      to_code(code, -32.0f, 31.0f);
      const F wc = (x * x) * code;
      sum_wcx += wc * x;
      sum_wcc += wc * code;
    }
    const F s = sum_wcx / (sum_wcc > 0 ? sum_wcc : one);
    const F gain = s * sum_wcx;
    const I better = gain > best;
    best = better ? gain : best;
    scale = better ? s : scale;
  }
  for (int l = 0; l < L; l++) scales[l] = scale[l];
}

// value / unit as a whole number from `low` to `high`; 0 where the unit is.
INLINE float multiple(float value, float unit, float low, float high) {
  float ratio = unit != 0 ? value / unit : 0.0f;
  ratio = ratio < low ? low : ratio;
  ratio = ratio > high ? high : ratio;
  return (ratio + 12582912.0f) - 12582912.0f;
}

// Eight values as multiples of one half-precision number, 6 bits each.
INLINE float six_bits(const float* values, float* multiples) {
  float largest = 0;
  for (int l = 0; l < 8; l++) largest = values[l] > largest ? values[l] : largest;
  const float unit = rounded_to_half(largest * (1.0f / 63));
  for (int l = 0; l < 8; l++) multiples[l] = multiple(values[l], unit, 0.0f, 63.0f);
  return unit;
}

template <int L, int top>
INLINE void encode_affine(const float* row, uint8_t* out) {
  using F = typename Vectors<L>::F;
  Columns<L, 32> x;
  float scales[8], minima[8], scale[8], minimum[8];
  uint8_t codes[8][32];
  gather(row, x);
  for (int part = 0; part < 8 / L; part++) fit_affine<L, top>(x, part, scales + part * L, minima + part * L);
  const float unit = six_bits(scales, scale), unit_min = six_bits(minima, minimum);
  for (int part = 0; part < 8 / L; part++) {
    F step, offset;
    for (int l = 0; l < L; l++) {
      step[l] = unit * scale[part * L + l];
      offset[l] = unit_min * minimum[part * L + l];
    }
    const F divisor = step > 0 ? step : F{} + 1.0f;
    for (int i = 0; i < 32; i++) {
      F code = (x.at[i][part] + offset) / divisor;
      to_code(code, 0.0f, float(top));
      code = step > 0 ? code : F{};
      for (int l = 0; l < L; l++) codes[part * L + l][i] = uint8_t(code[l]);
    }
  }
  const uint16_t halves[2] = {Float16::write(unit).raw, Float16::write(unit_min).raw};
  std::memcpy(out, halves, 4);
  for (int j = 0; j < 4; j++) {
    const uint8_t s = uint8_t(scale[j]), m = uint8_t(minimum[j]), s4 = uint8_t(scale[j + 4]),
                  m4 = uint8_t(minimum[j + 4]);
    out[4 + j] = uint8_t(s | (s4 >> 4) << 6);
    out[8 + j] = uint8_t(m | (m4 >> 4) << 6);
    out[12 + j] = uint8_t((s4 & 15) | (m4 & 15) << 4);
  }
  uint8_t* nibbles = out + 16;
  if (top == 31) {
    for (int i = 0; i < 32; i++) {
      uint8_t fifth = 0;
      for (int l = 0; l < 8; l++) fifth = uint8_t(fifth | (codes[l][i] >> 4) << l);
      nibbles[i] = fifth;
    }
    nibbles += 32;
  }
  for (int pair = 0; pair < 4; pair++) {
    for (int i = 0; i < 32; i++) {
      nibbles[pair * 32 + i] = uint8_t((codes[2 * pair][i] & 15) | (codes[2 * pair + 1][i] & 15) << 4);
    }
  }
}

template <int L>
INLINE void encode_symmetric(const float* row, uint8_t* out) {
  using F = typename Vectors<L>::F;
  Columns<L, 16> x[2];
  float scales[16], scale[16];
  uint8_t codes[block_size];
  for (int eight = 0; eight < 2; eight++) {
    gather(row + eight * 128, x[eight]);
    for (int part = 0; part < 8 / L; part++) fit_symmetric<L>(x[eight], part, scales + eight * 8 + part * L);
  }
  float top = 0, magnitude = 0;
  for (int l = 0; l < 16; l++) {
    const float size = std::fabs(scales[l]);
    top = size > magnitude ? scales[l] : top;
    magnitude = size > magnitude ? size : magnitude;
  }
  const float unit = rounded_to_half(top * -0.0078125f);  // the largest scale becomes -128
  for (int l = 0; l < 16; l++) scale[l] = multiple(scales[l], unit, -128.0f, 127.0f);
  for (int part = 0; part < 16 / L; part++) {
    F step;
    for (int l = 0; l < L; l++) step[l] = unit * scale[part * L + l];
    const F divisor = step != 0 ? step : F{} + 1.0f;
    const Columns<L, 16>& values = x[part * L / 8];
    for (int i = 0; i < 16; i++) {
      F code = values.at[i][part % (8 / L)] / divisor;
      to_code(code, -32.0f, 31.0f);
      code = (step != 0 ? code : F{}) + 32.0f;
      for (int l = 0; l < L; l++) codes[(part * L + l) * 16 + i] = uint8_t(code[l]);
    }
  }
  for (int half = 0; half < 2; half++) {
    const uint8_t* from = codes + half * 128;
    for (int i = 0; i < 64; i++) out[half * 64 + i] = uint8_t((from[i] & 15) | (from[i + 64] & 15) << 4);
    for (int i = 0; i < 32; i++) {
      out[128 + half * 32 + i] =
          uint8_t(from[i] >> 4 | (from[i + 32] >> 4) << 2 | (from[i + 64] >> 4) << 4 | (from[i + 96] >> 4) << 6);
    }
  }
  for (int l = 0; l < 16; l++) out[192 + l] = uint8_t(int8_t(scale[l]));
  const uint16_t raw = Float16::write(unit).raw;
  std::memcpy(out + 208, &raw, 2);
}

enum Kind { q4_k = 4, q5_k = 5, q6_k = 6 };

constexpr int64_t bytes_of(int kind) { return kind == q4_k ? 144 : kind == q5_k ? 176 : 210; }

template <int L>
INLINE void encode_blocks(const float* x, int kind, int64_t begin, int64_t end, uint8_t* out) {
  for (int64_t block = begin; block < end; block++) {
    const float* from = x + block * block_size;
    uint8_t* to = out + block * bytes_of(kind);
    if (kind == q4_k) encode_affine<L, 15>(from, to);
    if (kind == q5_k) encode_affine<L, 31>(from, to);
    if (kind == q6_k) encode_symmetric<L>(from, to);
  }
}

using Encode = void (*)(const float* x, int kind, int64_t begin, int64_t end, uint8_t* out);

void encode_portable(const float* x, int kind, int64_t begin, int64_t end, uint8_t* out) {
  encode_blocks<4>(x, kind, begin, end, out);
}

#ifdef HB_AVX2
__attribute__((target("avx2"))) void encode_avx2(const float* x, int kind, int64_t begin, int64_t end, uint8_t* out) {
  encode_blocks<8>(x, kind, begin, end, out);
}
#endif

Encode encoder() {
#ifdef HB_AVX2
  if (engine->codec != &portable_kernels) return encode_avx2;  // every other instruction set here has AVX2
#endif
  return encode_portable;
}

}  // namespace
}  // namespace hb

using namespace hb;

// `blocks` blocks of 256 weights as Q4_K (kind 4), Q5_K (5) or Q6_K (6): 144, 176 or 210 bytes each.
EXPORT int hb_gguf_encode(const float* x, int kind, int64_t blocks, uint8_t* out) {
  return guarded([&] {
    const Encode encode = encoder();
    over_range(blocks, 64, [&](int64_t begin, int64_t end) { encode(x, kind, begin, end, out); });
  });
}
