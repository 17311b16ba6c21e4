// The elementwise pieces of a decoder layer: norms with the residual add, gated units, norm and rotation of heads, and
// DoRA's factor a column.
//
// Each function does the rows [begin, end) in one pass over memory: a row is read from memory once and from cache after
// that. Storage in bfloat16 or float32, arithmetic in float, one rounding at the end. Strides count elements.
#pragma once

#include "../kernels.h"

namespace hb {

// s = x + norm(h) * post, y = norm(s) * pre, with norm(v) = v / sqrt(mean(v^2) + eps) over `width` features. What is
// null falls away: without h, s is x and not written; without post, h is added as it is; without pre there is no y. The
// norm of the rounded s is taken, which is what backward sees.
// Rows of x: `inner` of them `x_inner` apart, and such groups `x_outer` apart. All others are contiguous.
struct Norm {
  int64_t width, inner, x_outer, x_inner;
  const void *x, *h;
  const float *post, *pre;
  float eps;
  void *s, *y;
  float *rstd_h, *rstd_s;
};

// dx = ds + the gradient of y through its norm; dh = the gradient of dx through h's norm. ds or dy (with pre, s and
// rstd_s) may be null, and post with h, rstd_h and dh; dx is null where it would be a copy of ds. `s` has x's strides.
struct NormBackward {
  int64_t width, inner, s_outer, s_inner;
  const void *dy, *ds, *s, *h;
  const float *pre, *post, *rstd_s, *rstd_h;
  void *dx, *dh;
};

enum Activation { silu = 0, gelu_tanh = 1, gelu = 2 };

// out = act(gate) * up; rows of gate and up side by side, `stride` apart.
struct Gate {
  int64_t width, stride;
  const void* gate_up;
  void* out;
  int activation;
};

// May write over gate_up.
struct GateBackward {
  int64_t width, stride;
  const void *gate_up, *dout;
  void* dgate_up;  // rows 2 * width apart
  int activation;
};

// Norm (where there is a weight) and rotation of one token's heads; features i and i + half are a pair, those from
// 2 * half on are not rotated. May write over its input.
struct Heads {
  int64_t heads, features, half;
  const void* from;
  int64_t from_token, from_head;
  const void *cosine, *sine;  // [tokens, half], of type float or as the heads
  bool float_tables, inverse;
  const float* weight;
  float eps;
  float* rstd;  // [tokens, heads]
  void* to;
  int64_t to_token;  // heads `features` apart
};

// The gradient of a norm and a rotation; without a weight, `Heads` with `inverse` is that. May write over dy or x.
struct HeadsBackward {
  int64_t heads, features, half;
  const void* dy;
  int64_t dy_token, dy_head;
  const void *cosine, *sine;
  bool float_tables;
  const float* weight;
  const void* x;
  int64_t x_token;
  const float* rstd;
  void* dx;
  int64_t dx_token;
};

// out = x * scale + bias, by column; bias may be null. May write over x.
struct Columns {
  int64_t width;
  const void* x;
  const float *scale, *bias;
  void* out;
};

// dx = dy * scale, and the sums over rows of dy * kept. May write over dy.
struct ColumnsBackward {
  int64_t width;
  const void *dy, *kept;
  const float* scale;
  void* dx;
};

// Sums over rows (dpre, dpost, dweight, products: [width], null where not wanted) are added to what is there.
struct Elementwise {
  void (*norm)(const Norm&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end, float* dpre, float* dpost);
  void (*gate)(const Gate&, int64_t begin, int64_t end);
  void (*gate_backward)(const GateBackward&, int64_t begin, int64_t end);
  void (*heads)(const Heads&, int64_t begin, int64_t end);
  // scratch: `features` floats
  void (*heads_backward)(const HeadsBackward&, int64_t begin, int64_t end, float* scratch, float* dweight);
  void (*columns)(const Columns&, int64_t begin, int64_t end);
  void (*columns_backward)(const ColumnsBackward&, int64_t begin, int64_t end, float* products);
};

}  // namespace hb
