// The kernels for AVX-512 (F, BW, DQ, VL: every server and desktop core that has any of it since 2017).
//
// Decoding scales the 16 levels once a block, in float, rounds them to the output's type, and then only shuffles:
// 32 sixteen-bit weights take a byte shuffle, a shift and a word permute.
#include "scalar.h"

#ifdef HB_AVX512
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace hb {
namespace {

// Sixteen floats and one of the three storage types.
template <class T>
struct Vector;

template <>
struct Vector<BFloat16> {
  static INLINE __m512 read(const BFloat16* from) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static INLINE __m256i round(__m512 values) {
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc0)));
  }
};

template <>
struct Vector<Float16> {
  static INLINE __m512 read(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static INLINE __m256i round(__m512 values) {
    return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

template <>
struct Vector<Float32> {
  static INLINE __m512 read(const Float32* from) { return _mm512_loadu_ps(from); }
};

template <class T>
INLINE void write(T* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), Vector<T>::round(values));
}

template <>
INLINE void write(Float32* to, __m512 values) {
  _mm512_storeu_ps(to, values);
}

// Every word w of a lane becomes byte 4 * lane + w / 2; after the shift its low bits are a code. A word permute looks
// at five bits, of which the fifth is a neighbour's: the table stands there twice.
template <class T>
INLINE void dequantize4_run(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                            int64_t blocks, void* out) {
  const __m512 levels = _mm512_loadu_ps(table);
  const __m512i spread = _mm512_add_epi8(
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)),
      _mm512_setr_epi32(0, 0, 0, 0, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x08080808, 0x08080808, 0x08080808,
                        0x08080808, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c));
  const __m512i shift = _mm512_set1_epi32(4);
  T* to = static_cast<T*>(out);
  for (int64_t block = 0; block < blocks; block++) {
    __m256i once = Vector<T>::round(_mm512_mul_ps(levels, _mm512_set1_ps(absmax[block])));
    __m512i scaled = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
    for (int64_t i = 0; i < blocksize; i += 32, codes += 16, to += 32) {
      __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), shift);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, scaled));
    }
  }
}

template <>
INLINE void dequantize4_run<Float32>(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                                     int64_t blocks, void* out) {
  const __m512 levels = _mm512_loadu_ps(table);
  const __m512i spread = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i shift = _mm512_set1_epi64(4);
  float* to = static_cast<float*>(out);
  for (int64_t block = 0; block < blocks; block++) {
    __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(absmax[block]));
    for (int64_t i = 0; i < blocksize; i += 16, codes += 8, to += 16) {
      __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
      __m512i bytes = _mm512_permutexvar_epi32(spread, _mm512_cvtepu8_epi32(eight));
      _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, shift), scaled));
    }
  }
}

template <class T>
TARGET void dequantize4(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                        int64_t blocks, void* out) {
  // The usual size as a constant lets the compiler unroll the inner loop away.
  if (blocksize == 64) {
    dequantize4_run<T>(codes, absmax, table, 64, blocks, out);
  } else {
    dequantize4_run<T>(codes, absmax, table, blocksize, blocks, out);
  }
}

template <class T>
TARGET void dequantize8(const uint8_t* codes, const float* absmax, int64_t blocksize, int64_t blocks, void* out) {
  T* to = static_cast<T*>(out);
  for (int64_t block = 0; block < blocks; block++) {
    const __m512 step = _mm512_set1_ps(absmax[block] / 127);
    for (int64_t i = 0; i < blocksize; i += 16, codes += 16, to += 16) {
      __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      __m512 values = _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(128)));
      write(to, _mm512_mul_ps(values, step));
    }
  }
}

template <class T>
INLINE float largest_of(const T* from, int64_t blocksize) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < blocksize; i += 16) {
    __m512i bits = _mm512_castps_si512(Vector<T>::read(from + i));
    top = _mm512_max_epu32(top, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return float_of(_mm512_reduce_max_epu32(top));
}

INLINE __m512 scaled_of(__m512 values, float reciprocal) {
  values = _mm512_mul_ps(values, _mm512_set1_ps(reciprocal));
  return _mm512_min_ps(_mm512_max_ps(values, _mm512_set1_ps(-1)), _mm512_set1_ps(1));
}

template <class T>
TARGET void quantize4(const void* x, const float* midpoints, const uint8_t* order, int64_t blocksize, int64_t blocks,
                      uint8_t* codes, float* absmax) {
  const __m512 middles = _mm512_maskz_loadu_ps(0x7fff, midpoints);
  const __m512i names = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(order)));
  const __m128i places = _mm_set1_epi16(0x0110);  // the earlier of two codes times 16, the later times 1
  const T* from = static_cast<const T*>(x);
  for (int64_t block = 0; block < blocks; block++) {
    absmax[block] = largest_of(from, blocksize);
    const float reciprocal = 1.0f / at_least_smallest(absmax[block]);
    for (int64_t i = 0; i < blocksize; i += 16, from += 16, codes += 8) {
      __m512 values = scaled_of(Vector<T>::read(from), reciprocal);
      __m512i below = _mm512_setzero_si512();
      for (int step = 8; step > 0; step /= 2) {
        __m512i next = _mm512_add_epi32(below, _mm512_set1_epi32(step - 1));
        __mmask16 up = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(next, middles), values, _CMP_LT_OQ);
        below = _mm512_mask_add_epi32(below, up, below, _mm512_set1_epi32(step));
      }
      __m128i bytes = _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(below, names));
      __m128i pairs = _mm_maddubs_epi16(bytes, places);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(pairs, pairs));
    }
  }
}

template <class T>
TARGET void quantize8(const void* x, int64_t blocksize, int64_t blocks, uint8_t* codes, float* absmax) {
  const T* from = static_cast<const T*>(x);
  for (int64_t block = 0; block < blocks; block++) {
    absmax[block] = largest_of(from, blocksize);
    const float reciprocal = 1.0f / at_least_smallest(absmax[block]);
    for (int64_t i = 0; i < blocksize; i += 16, from += 16, codes += 16) {
      __m512 values = _mm512_mul_ps(scaled_of(Vector<T>::read(from), reciprocal), _mm512_set1_ps(127));
      __m512i rounded = _mm512_cvt_roundps_epi32(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), bytes);
    }
  }
}

}  // namespace

const Kernels avx512_kernels = {
    "avx512",
    {dequantize4<BFloat16>, dequantize4<Float16>, dequantize4<Float32>},
    {dequantize8<BFloat16>, dequantize8<Float16>, dequantize8<Float32>},
    {quantize4<BFloat16>, quantize4<Float16>, quantize4<Float32>},
    {quantize8<BFloat16>, quantize8<Float16>, quantize8<Float32>},
};

}  // namespace hb
#endif
