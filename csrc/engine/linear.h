// A group of linears that share an input, with their LoRA adapters: y_s = x W_s^T + b_s + scaling_s (x A_s^T) B_s^T, and
// the gradients of x, A_s and B_s. What Python hands over, and what an instruction set implements.
#pragma once

#include "../kernels.h"

namespace hb {

// A frozen weight [rows x cols], row-major: dense, or in flat blocks of `blocksize` that may span rows.
struct WeightView {
  int64_t kind;  // 0 … 2: dense in that Dtype; 3: 4-bit blocks; 4: INT8 blocks
  int64_t rows, cols;
  const void* data;           // values or codes
  const void* absmax;         // float [blocks], or 8-bit codes where nested
  const float* table;         // 16 levels
  const float* nested_absmax;  // null: the constants are not nested
  const float* nested_offset;
  const float* nested_table;
  int64_t blocksize, nested_blocksize;
};

struct SegmentView {
  WeightView weight;
  const float* bias;    // [rows] or null
  const float* lora_A;  // [rank x cols]
  const float* lora_B;  // [rows x rank]
  float* grad_A;        // null: not wanted
  float* grad_B;
  int64_t rank;  // 0: no adapter
  double scaling;
};

// Columns that the low-rank activations of a segment take: two bfloat16 are multiplied at once.
inline int64_t padded_rank(const SegmentView& segment) { return (segment.rank + 1) / 2 * 2; }

struct LinearKernels {
  // y [T x sum of rows], rows `ldy` apart; low [T x sum of padded ranks] is kept for the gradients.
  void (*forward)(int64_t T, const void* x, int64_t ldx, const SegmentView* segments, int64_t count, void* y,
                  int64_t ldy, void* low);
  // dx may be null.
  void (*backward)(int64_t T, const void* dy, int64_t ldy, const void* x, int64_t ldx, const void* low,
                   const SegmentView* segments, int64_t count, void* dx, int64_t lddx);
};

}  // namespace hb
