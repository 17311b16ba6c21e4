// What an instruction set brings: kernels over whole blocks. Everything partial is `halfbyte.cpp`'s, in plain C++.
//
// All of them equal `halfbyte/ops/reference.py` bit for bit; blocksize is a multiple of 32.
#pragma once

#include "numbers.h"

namespace hb {

constexpr float smallest_absmax = 1e-38f;

// Decode `blocks` blocks. `table` has 16 levels; a block's values are table[code] * absmax.
using Dequantize4 = void (*)(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                             int64_t blocks, void* out);
// A block's values are (code - 128) * (absmax / 127).
using Dequantize8 = void (*)(const uint8_t* codes, const float* absmax, int64_t blocksize, int64_t blocks, void* out);
// Encode `blocks` blocks: rank among the 15 midpoints, then code = order[rank]. An absmax that is infinite or NaN
// says that the block was.
using Quantize4 = void (*)(const void* x, const float* midpoints, const uint8_t* order, int64_t blocksize,
                           int64_t blocks, uint8_t* codes, float* absmax);
using Quantize8 = void (*)(const void* x, int64_t blocksize, int64_t blocks, uint8_t* codes, float* absmax);

enum Dtype { bfloat16 = 0, float16 = 1, float32 = 2, dtypes = 3 };

struct Kernels {
  const char* name;
  Dequantize4 dequantize4[dtypes];
  Dequantize8 dequantize8[dtypes];
  Quantize4 quantize4[dtypes];
  Quantize8 quantize8[dtypes];
};

extern const Kernels portable_kernels;
#ifdef HB_AVX2
extern const Kernels avx2_kernels;
#endif
#ifdef HB_AVX512
extern const Kernels avx512_kernels;
#endif

}  // namespace hb
