// The table of what one instruction set brings to training: products over packed panels and the passes around them.
//
// Every `isa_*.cpp` compiles the same sources (`*.inc`) for its instruction set in a namespace of its own. Element types
// are bfloat16 and float32; all accumulation is in float.
#pragma once

#include "../kernels.h"
#include "../parallel.h"
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "loss.h"

namespace hb {

// C[M x N] (+)= A[M x K] B[K x N], accumulated in float.
//   A  row-major, rows `lda` elements apart
//   B  packed: bfloat16 in pairs of rows, [ceil(K / 2)][ldb][2]; float32 as it is, [K][ldb]. N a multiple of 16.
//   K  even for bfloat16 (an odd last row is padded with zeros, in A too)
//   C  row-major, rows `ldc` floats apart; overwritten unless `accumulate`
using Block = void (*)(int64_t M, int64_t N, int64_t K, const void* A, int64_t lda, const void* B, int64_t ldb,
                       float* C, int64_t ldc, bool accumulate);

struct Engine {
  const char* name;
  const Kernels* codec;  // the block formats: what they cost differs less between instruction sets
  // By Dtype; null where products of that type are better left to torch.
  Block block[dtypes];
  const LinearKernels* linear[dtypes];
  const LossKernels* loss[dtypes];
  const AttentionKernels* attention[dtypes];
  const Elementwise* elementwise;  // by Dtype; none of float16
  // Rows `index` of a weight, or `count` from `first` on where that is null, [count x cols].
  void (*decode_rows[dtypes])(const WeightView& weight, const int64_t* index, int64_t first, int64_t count, void* out);
};

extern const Engine portable_engine;
#ifdef HB_ENGINE_AVX2
extern const Engine avx2_engine;
#endif
#ifdef HB_ENGINE_AVX512
extern const Engine avx512_engine;
#endif
#ifdef HB_ENGINE_AVX512BF16
extern const Engine avx512bf16_engine;
#endif
#ifdef HB_ENGINE_AMX
extern const Engine amx_engine;
#endif
#ifdef HB_ENGINE_AMX_EMULATED
extern const Engine amx_emulated_engine;
#endif

// The one in use, chosen by `hb_use`.
extern const Engine* engine;

}  // namespace hb
