// The kernels in plain C++, for every processor.
#include "scalar.h"

namespace hb {
namespace {

template <class T>
void dequantize4(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize, int64_t blocks,
                 void* out) {
  T* to = static_cast<T*>(out);
  for (int64_t block = 0; block < blocks; block++) {
    T scaled[16];
    for (int i = 0; i < 16; i++) scaled[i] = T::write(table[i] * absmax[block]);
    for (int64_t i = 0; i < blocksize / 2; i++, codes++, to += 2) {
      to[0] = scaled[*codes >> 4];
      to[1] = scaled[*codes & 15];
    }
  }
}

template <class T>
void dequantize8(const uint8_t* codes, const float* absmax, int64_t blocksize, int64_t blocks, void* out) {
  T* to = static_cast<T*>(out);
  for (int64_t block = 0; block < blocks; block++) {
    float step = absmax[block] / 127;
    for (int64_t i = 0; i < blocksize; i++) *to++ = T::write(float(int(*codes++) - 128) * step);
  }
}

// A search among the midpoints cannot be vectorized; 15 comparisons of 32 values at once can. All midpoints lie inside
// [-1, 1] or below -1 by more than a rounding, so that clamping would change nothing.
template <class T>
void quantize4(const void* x, const float* midpoints, const uint8_t* order, int64_t blocksize, int64_t blocks,
               uint8_t* codes, float* absmax) {
  const T* from = static_cast<const T*>(x);
  for (int64_t block = 0; block < blocks; block++) {
    Scale scale = scale_of(from, blocksize, true, absmax + block);
    for (int64_t i = 0; i < blocksize; i += 32, from += 32, codes += 16) {
      float values[32];
      int32_t below[32] = {};
      for (int k = 0; k < 32; k++) values[k] = T::read(from[k]) * scale.reciprocal;
      for (int m = 0; m < 15; m++)
        for (int k = 0; k < 32; k++) below[k] += midpoints[m] < values[k];
      for (int k = 0; k < 16; k++) codes[k] = uint8_t(order[below[2 * k]] << 4 | order[below[2 * k + 1]]);
    }
  }
}

template <class T>
void quantize8(const void* x, int64_t blocksize, int64_t blocks, uint8_t* codes, float* absmax) {
  const T* from = static_cast<const T*>(x);
  for (int64_t block = 0; block < blocks; block++) {
    Scale scale = scale_of(from, blocksize, true, absmax + block);
    for (int64_t i = 0; i < blocksize; i++) *codes++ = code8(scale(T::read(*from++)));
  }
}

}  // namespace

const Kernels portable_kernels = {
    "portable",
    {dequantize4<BFloat16>, dequantize4<Float16>, dequantize4<Float32>},
    {dequantize8<BFloat16>, dequantize8<Float16>, dequantize8<Float32>},
    {quantize4<BFloat16>, quantize4<Float16>, quantize4<Float32>},
    {quantize8<BFloat16>, quantize8<Float16>, quantize8<Float32>},
};

}  // namespace hb
