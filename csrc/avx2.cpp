// The kernels for AVX2 and F16C (Haswell and Zen onwards). A byte shuffle looks 16 entries up, so 16-bit levels are
// looked up as two halves and put together again.
#include "scalar.h"

#ifdef HB_AVX2
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace hb {
namespace {

// Eight floats and one of the three storage types.
template <class T>
struct Vector;

template <>
struct Vector<BFloat16> {
  static INLINE __m256 read(const BFloat16* from) {
    __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static INLINE __m128i round(__m256 values) {
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  }
};

template <>
struct Vector<Float16> {
  static INLINE __m256 read(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static INLINE __m128i round(__m256 values) { return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }
};

template <>
struct Vector<Float32> {
  static INLINE __m256 read(const Float32* from) { return _mm256_loadu_ps(&from->raw); }
};

template <class T>
INLINE void write(T* to, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), Vector<T>::round(values));
}

template <>
INLINE void write(Float32* to, __m256 values) {
  _mm256_storeu_ps(&to->raw, values);
}

// The 32 codes of 16 bytes in order: 0 … 15 in the lower lane, 16 … 31 in the upper.
INLINE __m256i codes_of(const uint8_t* codes) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  return _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
}

template <class T>
INLINE void dequantize4_run(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                            int64_t blocks, void* out) {
  T* to = static_cast<T*>(out);
  for (int64_t block = 0; block < blocks; block++) {
    __m256 factor = _mm256_set1_ps(absmax[block]);
    __m128i lower = Vector<T>::round(_mm256_mul_ps(_mm256_loadu_ps(table), factor));
    __m128i upper = Vector<T>::round(_mm256_mul_ps(_mm256_loadu_ps(table + 8), factor));
    __m128i byte = _mm_set1_epi16(0xff);
    __m128i first = _mm_packus_epi16(_mm_and_si128(lower, byte), _mm_and_si128(upper, byte));
    __m128i second = _mm_packus_epi16(_mm_srli_epi16(lower, 8), _mm_srli_epi16(upper, 8));
    __m256i firsts = _mm256_broadcastsi128_si256(first), seconds = _mm256_broadcastsi128_si256(second);
    for (int64_t i = 0; i < blocksize; i += 32, codes += 16, to += 32) {
      __m256i index = codes_of(codes);
      __m256i low = _mm256_shuffle_epi8(firsts, index), high = _mm256_shuffle_epi8(seconds, index);
      __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}

template <>
INLINE void dequantize4_run<Float32>(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                                     int64_t blocks, void* out) {
  // Of eight codes a byte pair gives two: dword w is byte w / 2, shifted by 4 where w is even.
  const __m256i spread = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const __m256i shift = _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0);
  float* to = static_cast<float*>(out);
  for (int64_t block = 0; block < blocks; block++) {
    __m256 factor = _mm256_set1_ps(absmax[block]);
    __m256 lower = _mm256_mul_ps(_mm256_loadu_ps(table), factor);
    __m256 upper = _mm256_mul_ps(_mm256_loadu_ps(table + 8), factor);
    for (int64_t i = 0; i < blocksize; i += 8, codes += 4, to += 8) {
      int32_t four;
      std::memcpy(&four, codes, 4);
      __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi32_si128(four)), spread);
      __m256i index = _mm256_srlv_epi32(bytes, shift);
      __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      __m256 below = _mm256_permutevar8x32_ps(lower, index), above = _mm256_permutevar8x32_ps(upper, index);
      _mm256_storeu_ps(to, _mm256_blendv_ps(below, above, bit3));
    }
  }
}

template <class T>
TARGET void dequantize4(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                        int64_t blocks, void* out) {
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
    const __m256 step = _mm256_set1_ps(absmax[block] / 127);
    for (int64_t i = 0; i < blocksize; i += 8, codes += 8, to += 8) {
      __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
      __m256 values = _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(128)));
      write(to, _mm256_mul_ps(values, step));
    }
  }
}

template <class T>
INLINE float largest_of(const T* from, int64_t blocksize) {
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < blocksize; i += 8) {
    __m256i bits = _mm256_castps_si256(Vector<T>::read(from + i));
    top = _mm256_max_epu32(top, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return float_of(uint32_t(_mm_cvtsi128_si32(half)));
}

INLINE __m256 scaled_of(__m256 values, float reciprocal) {
  values = _mm256_mul_ps(values, _mm256_set1_ps(reciprocal));
  return _mm256_min_ps(_mm256_max_ps(values, _mm256_set1_ps(-1)), _mm256_set1_ps(1));
}

// Eight dwords below 256 as eight bytes.
INLINE __m128i bytes_of(__m256i wide) {
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm_packus_epi16(words, words);
}

template <class T>
TARGET void quantize4(const void* x, const float* midpoints, const uint8_t* order, int64_t blocksize, int64_t blocks,
                      uint8_t* codes, float* absmax) {
  const __m128i names = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
  const __m128i places = _mm_set1_epi16(0x0110);  // the earlier of two codes times 16, the later times 1
  const T* from = static_cast<const T*>(x);
  for (int64_t block = 0; block < blocks; block++) {
    absmax[block] = largest_of(from, blocksize);
    const float reciprocal = 1.0f / at_least_smallest(absmax[block]);
    for (int64_t i = 0; i < blocksize; i += 8, from += 8, codes += 4) {
      __m256 values = scaled_of(Vector<T>::read(from), reciprocal);
      __m256i below = _mm256_setzero_si256();
      for (int m = 0; m < 15; m++) {
        __m256 up = _mm256_cmp_ps(_mm256_set1_ps(midpoints[m]), values, _CMP_LT_OQ);
        below = _mm256_sub_epi32(below, _mm256_castps_si256(up));
      }
      __m128i pairs = _mm_maddubs_epi16(_mm_shuffle_epi8(names, bytes_of(below)), places);
      int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
      std::memcpy(codes, &four, 4);
    }
  }
}

template <class T>
TARGET void quantize8(const void* x, int64_t blocksize, int64_t blocks, uint8_t* codes, float* absmax) {
  const __m256 magic = _mm256_set1_ps(12582912.0f);  // see code8
  const T* from = static_cast<const T*>(x);
  for (int64_t block = 0; block < blocks; block++) {
    absmax[block] = largest_of(from, blocksize);
    const float reciprocal = 1.0f / at_least_smallest(absmax[block]);
    for (int64_t i = 0; i < blocksize; i += 8, from += 8, codes += 8) {
      __m256 values = _mm256_mul_ps(scaled_of(Vector<T>::read(from), reciprocal), _mm256_set1_ps(127));
      __m256 rounded = _mm256_sub_ps(_mm256_add_ps(values, magic), magic);
      __m256i wide = _mm256_add_epi32(_mm256_cvttps_epi32(rounded), _mm256_set1_epi32(128));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), bytes_of(wide));
    }
  }
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2",
    {dequantize4<BFloat16>, dequantize4<Float16>, dequantize4<Float32>},
    {dequantize8<BFloat16>, dequantize8<Float16>, dequantize8<Float32>},
    {quantize4<BFloat16>, quantize4<Float16>, quantize4<Float32>},
    {quantize8<BFloat16>, quantize8<Float16>, quantize8<Float32>},
};

}  // namespace hb
#endif
