// A group of linears that share an input, with their LoRA adapters: y_s = x W_s^T + b_s + scaling_s (x A_s^T) B_s^T, and
// the gradients of x, A_s and B_s. What Python hands over, and what an instruction set implements.
#pragma once

#include "../kernels.h"

namespace hb {

// What a weight's bytes are: below these, dense in that Dtype.
enum WeightKind { blocks4 = 3, blocks8 = 4, q4_0 = 5, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, group4, group8 };

// Values and bytes of one of GGUF's blocks.
constexpr int64_t gguf_values(int64_t kind) { return kind >= q4_k ? 256 : 32; }
constexpr int64_t gguf_bytes(int64_t kind) {
  constexpr int64_t sizes[] = {18, 20, 22, 24, 34, 144, 176, 210};
  return sizes[kind - q4_0];
}

// A frozen weight [rows x cols], row-major: dense, in flat blocks of `blocksize` that may span rows, or in GGUF's blocks,
// which do not, or in GPTQ's and AWQ's codes.
struct WeightView {
  int64_t kind;  // a Dtype or a WeightKind
  int64_t rows, cols;
  const void* data;           // values or codes
  const void* absmax;         // float [blocks], or 8-bit codes where nested
  const float* table;         // 16 levels
  const float* nested_absmax;  // null: the constants are not nested
  const float* nested_offset;
  const float* nested_table;
  int64_t blocksize, nested_blocksize;
  int64_t head_rows;  // GGUF: rows of a head whose halves the file interleaves, 0 where it does not
  // GPTQ and AWQ: `absmax` is uint32 [rows x groups], a half-precision scale and above it the zero point; `blocksize`
  // the columns of a group; with act-order `group_of` [cols] says the group of each column, else it is null.
  int64_t groups;
  const int32_t* group_of;
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
