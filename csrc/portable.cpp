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

template <class T>
void quantize4(const void* x, const float* midpoints, const uint8_t* order, int64_t blocksize, int64_t blocks,
               uint8_t* codes, float* absmax) {
  const T* from = static_cast<const T*>(x);
  for (int64_t block = 0; block < blocks; block++) {
    Scale scale = scale_of(from, blocksize, true, absmax + block);
    for (int64_t i = 0; i < blocksize / 2; i++, from += 2) {
      int high = order[rank<15>(midpoints, scale(T::read(from[0])))];
      int low = order[rank<15>(midpoints, scale(T::read(from[1])))];
      *codes++ = uint8_t(high << 4 | low);
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
