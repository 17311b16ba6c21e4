// The C interface of elementwise.h that `halfbyte/ops/elementwise.py` calls: rows over torch's threads.
#include "elementwise.h"

#include <vector>

#include "engine.h"
#include "export.h"

namespace hb {
namespace {

constexpr int64_t elements_per_thread = 1 << 14;  // some 5 µs of work, against 2 to wake a thread
constexpr int64_t sums_at_most = 32;

int64_t grain_of(int64_t row) { return std::max<int64_t>(elements_per_thread / std::max<int64_t>(row, 1), 1); }

// function(begin, end, sums) over rows of `row` elements, where `sums` are `size` floats of its own, added into `total`
// afterwards. Which rows share sums depends on the rows alone: any number of threads gives the same bits.
template <class Function>
void over_rows_with_sums(int64_t rows, int64_t row, int64_t size, float* total, const Function& function) {
  const int64_t parts = std::max<int64_t>(std::min(rows / grain_of(row), sums_at_most), 1);
  std::vector<float> sums(parts * size);
  over_range(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) function(i * rows / parts, (i + 1) * rows / parts, &sums[i * size]);
  });
  for (int64_t j = 0; j < size; j++) total[j] = 0;
  for (int64_t i = 0; i < parts; i++) {
    for (int64_t j = 0; j < size; j++) total[j] += sums[i * size + j];
  }
}

}  // namespace
}  // namespace hb

using namespace hb;

EXPORT int hb_norm(int dtype, int64_t rows, int64_t width, const void* x, int64_t inner, int64_t x_outer,
                   int64_t x_inner, const void* h, const float* post, const float* pre, float eps, void* s, void* y,
                   float* rstd_h, float* rstd_s) {
  return guarded([&] {
    const Norm work = {width, inner, x_outer, x_inner, x, h, post, pre, eps, s, y, rstd_h, rstd_s};
    over_range(rows, grain_of(width),
               [&](int64_t begin, int64_t end) { engine->elementwise[dtype].norm(work, begin, end); });
  });
}

// dweights: [2, width], the sums of pre and of post; null where not wanted.
EXPORT int hb_norm_backward(int dtype, int64_t rows, int64_t width, const void* dy, const void* ds, const void* s,
                            int64_t inner, int64_t s_outer, int64_t s_inner, const void* h, const float* pre,
                            const float* post, const float* rstd_s, const float* rstd_h, void* dx, void* dh,
                            float* dweights) {
  return guarded([&] {
    const NormBackward work = {width, inner, s_outer, s_inner, dy, ds, s, h, pre, post, rstd_s, rstd_h, dx, dh};
    const auto run = engine->elementwise[dtype].norm_backward;
    if (dweights) {
      over_rows_with_sums(rows, width, 2 * width, dweights, [&](int64_t begin, int64_t end, float* sums) {
        run(work, begin, end, sums, sums + width);
      });
    } else {
      over_range(rows, grain_of(width), [&](int64_t begin, int64_t end) { run(work, begin, end, nullptr, nullptr); });
    }
  });
}

EXPORT int hb_gate(int dtype, int64_t rows, int64_t width, const void* gate_up, int64_t stride, int activation,
                   void* out) {
  return guarded([&] {
    const Gate work = {width, stride, gate_up, out, activation};
    over_range(rows, grain_of(width),
               [&](int64_t begin, int64_t end) { engine->elementwise[dtype].gate(work, begin, end); });
  });
}

EXPORT int hb_gate_backward(int dtype, int64_t rows, int64_t width, const void* gate_up, int64_t stride,
                            const void* dout, int activation, void* dgate_up) {
  return guarded([&] {
    const GateBackward work = {width, stride, gate_up, dout, dgate_up, activation};
    over_range(rows, grain_of(width),
               [&](int64_t begin, int64_t end) { engine->elementwise[dtype].gate_backward(work, begin, end); });
  });
}

EXPORT int hb_heads(int dtype, int64_t tokens, int64_t heads, int64_t features, int64_t half, const void* from,
                    int64_t from_token, int64_t from_head, const void* cosine, const void* sine, int float_tables,
                    int inverse, const float* weight, float eps, float* rstd, void* to, int64_t to_token) {
  return guarded([&] {
    const Heads work = {heads, features, half, from, from_token, from_head, cosine, sine, float_tables != 0,
                        inverse != 0, weight, eps, rstd, to, to_token};
    over_range(tokens, grain_of(heads * features),
               [&](int64_t begin, int64_t end) { engine->elementwise[dtype].heads(work, begin, end); });
  });
}

// dweight: [features], null where not wanted.
EXPORT int hb_heads_backward(int dtype, int64_t tokens, int64_t heads, int64_t features, int64_t half, const void* dy,
                             int64_t dy_token, int64_t dy_head, const void* cosine, const void* sine,
                             int float_tables, const float* weight, const void* x, int64_t x_token, const float* rstd,
                             void* dx, int64_t dx_token, float* dweight) {
  return guarded([&] {
    const HeadsBackward work = {heads, features, half, dy, dy_token, dy_head, cosine, sine, float_tables != 0,
                                weight, x, x_token, rstd, dx, dx_token};
    const auto run = engine->elementwise[dtype].heads_backward;
    if (dweight) {
      over_rows_with_sums(tokens, heads * features, features, dweight, [&](int64_t begin, int64_t end, float* sums) {
        std::vector<float> scratch(features);
        run(work, begin, end, scratch.data(), sums);
      });
    } else {
      over_range(tokens, grain_of(heads * features), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(features);
        run(work, begin, end, scratch.data(), nullptr);
      });
    }
  });
}

// out may be x.
EXPORT int hb_columns(int dtype, int64_t rows, int64_t width, const void* x, const float* scale, const float* bias,
                      void* out) {
  return guarded([&] {
    const Columns work = {width, x, scale, bias, out};
    over_range(rows, grain_of(width),
               [&](int64_t begin, int64_t end) { engine->elementwise[dtype].columns(work, begin, end); });
  });
}

// products: [width], the sums over rows of dy * kept. dx may be dy.
EXPORT int hb_columns_backward(int dtype, int64_t rows, int64_t width, const void* dy, const void* kept,
                               const float* scale, void* dx, float* products) {
  return guarded([&] {
    const ColumnsBackward work = {width, dy, kept, scale, dx};
    const auto run = engine->elementwise[dtype].columns_backward;
    over_rows_with_sums(rows, width, width, products,
                        [&](int64_t begin, int64_t end, float* sums) { run(work, begin, end, sums); });
  });
}
