// Vectors of float for whatever instruction set this file is compiled for, with the conversions and functions that the
// engine needs. Written with the vector extensions of GCC and Clang; intrinsics only where those have no word for it.
//
// Included inside `namespace hb::HB_ISA`, so that no two instruction sets share a function.

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

#define HB_INLINE static inline __attribute__((always_inline))

HB_INLINE vf broadcast(float value) { return vf{} + value; }
HB_INLINE vf as_float(vi bits) { return (vf)bits; }
HB_INLINE vi as_int(vf value) { return (vi)value; }

// Storage types. `load` and `store` take any alignment; `load_some` and `store_some` only the first `count` (0 … W).
HB_INLINE vf load(const float* from) {
  vf value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

HB_INLINE vf load(const int8_t* from) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  vf value;
  for (int i = 0; i < W; i++) value[i] = float(from[i]);
  return value;
#endif
}

HB_INLINE void store(float* to, vf value) { __builtin_memcpy(to, &value, sizeof value); }

HB_INLINE vf widen(vh raw) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)raw) << 16);  // GCC 12 converts halves
#else
  return (vf)(__builtin_convertvector(raw, vu) << 16);
#endif
}

HB_INLINE vf load(const BFloat16* from) {
  vh raw;
  __builtin_memcpy(&raw, from, sizeof raw);
  return widen(raw);
}

// Rounds half to even; a NaN stays one.
HB_INLINE vh round_to_bf16(vf value) {
#if defined(__AVX512BF16__)
  __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
  vh raw;
  __builtin_memcpy(&raw, &rounded, sizeof raw);
  return raw;
#else
  vu bits = (vu)value;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vi nan = value != value;
  rounded = ((vu)nan & 0x7fc0) | (~(vu)nan & rounded);
#if defined(__AVX512F__)
  __m256i narrow = _mm512_cvtepi32_epi16((__m512i)rounded);
  vh raw;
  __builtin_memcpy(&raw, &narrow, sizeof raw);
  return raw;
#elif defined(__AVX2__)
  __m256i wide = (__m256i)rounded;
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  return __builtin_convertvector(rounded, vh);
#endif
#endif
}

HB_INLINE void store(BFloat16* to, vf value) {
  vh raw = round_to_bf16(value);
  __builtin_memcpy(to, &raw, sizeof raw);
}

template <class T>
HB_INLINE vf load_some(const T* from, int64_t count) {
  T part[W] = {};
  __builtin_memcpy(part, from, count * sizeof(T));
  return load(part);
}

template <class T>
HB_INLINE void store_some(T* to, vf value, int64_t count) {
  T part[W];
  store(part, value);
  __builtin_memcpy(to, part, count * sizeof(T));
}

// GCC makes a comparison and a blend of `a < b ? a : b` where one is constant.
#if defined(__AVX512F__)
HB_INLINE vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
HB_INLINE vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
HB_INLINE vf maximum(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
HB_INLINE vf minimum(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
HB_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
HB_INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }
#endif
HB_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

HB_INLINE float sum_of(vf value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += value[i];
  return total;
#endif
}

HB_INLINE float largest_of(vf value) {
  float top = value[0];
  for (int i = 1; i < W; i++) top = value[i] > top ? value[i] : top;
  return top;
}

// e^x within 2 units in the last place: x = n ln 2 + r, a polynomial of r in [-ln 2 / 2, ln 2 / 2] (Cephes' expf), n
// added to the exponent. Below -87 the result is 0, above 88 it stays at e^88; NaN gives a finite number.
HB_INLINE vf exp_of(vf x) {
  vi tiny = x < broadcast(-87.0f);
  x = maximum(minimum(x, broadcast(88.0f)), broadcast(-87.0f));
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vf n = (x * 1.44269504088896341f + magic) - magic;
#endif
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  vf result = (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  vf result = p * as_float(exponent);
#endif
  return select(tiny, vf{}, result);
}

HB_INLINE vf sigmoid_of(vf x) { return 1.0f / (1.0f + exp_of(-x)); }

// tanh through e^2x; near 0, where that would cancel, the start of its series (error below 3e-7 relative).
HB_INLINE vf tanh_of(vf x) {
  vf square = x * x;
  vf near = x * (1.0f + square * (-0.333333333f + square * (0.133333333f + square * -0.0539682540f)));
  vf far = 1.0f - 2.0f / (exp_of(x + x) + 1.0f);
  vi small = square < broadcast(0.01f);
  return select(small, near, far);
}
