// The C interface of linear.h, called by halfbyte/ops/linear.py.
#include "linear.h"

#include "engine.h"
#include "export.h"

using namespace hb;

// dtype is one that `hb_multiplies`; sizes and types have been checked. Every weight has as many columns as x.
EXPORT int hb_linear_forward(int dtype, int64_t tokens, const void* x, int64_t ldx, const SegmentView* segments,
                             int64_t count, void* y, int64_t ldy, void* low) {
  return guarded([&] {
    if (tokens) engine->linear[dtype]->forward(tokens, x, ldx, segments, count, y, ldy, low);
  });
}

EXPORT int hb_linear_backward(int dtype, int64_t tokens, const void* dy, int64_t ldy, const void* x, int64_t ldx,
                              const void* low, const SegmentView* segments, int64_t count, void* dx, int64_t lddx) {
  return guarded([&] {
    engine->linear[dtype]->backward(tokens, dy, ldy, x, ldx, low, segments, count, dx, lddx);
  });
}

// dtype: bfloat16 or float32. `index` may be null: `count` rows from `first` on.
EXPORT int hb_decode_rows(int dtype, const WeightView* weight, const int64_t* index, int64_t first, int64_t count,
                          void* out) {
  return guarded([&] {
    engine->decode_rows[dtype](*weight, index, first, count, out);
  });
}
