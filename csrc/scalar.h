// One value at a time: the arithmetic of the reference, for the portable kernels and for every partial block.
#pragma once

#include "kernels.h"

namespace hb {

// How many of 15 rising `midpoints` lie below `value`: a value goes up only where it is greater than the midpoint.
inline int rank(const float* midpoints, float value) {
  int below = 0;
  for (int step = 8; step > 0; step /= 2) below += int(midpoints[below + step - 1] < value) * step;
  return below;
}

inline float clamp(float value) { return value < -1 ? -1 : value > 1 ? 1 : value; }

// 128 + round-half-even(value * 127) for value in [-1, 1]; 1.5 * 2^23 has steps of 1, so adding it rounds.
inline uint8_t code8(float value) {
  float shifted = value * 127 + 12582912.0f;
  return uint8_t(int(shifted - 12582912.0f) + 128);
}

// The largest magnitude. On the bits, where NaN and infinity come out on top of every number.
template <class T>
inline float largest(const T* x, int64_t count) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t magnitude = bits_of(T::read(x[i])) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  return float_of(top);
}

inline float at_least_smallest(float absmax) { return absmax < smallest_absmax ? smallest_absmax : absmax; }

// What turns a block's values into [-1, 1]: a whole block is multiplied by the reciprocal, a shorter one divided.
struct Scale {
  float absmax, reciprocal;
  bool whole;
  float operator()(float value) const { return clamp(whole ? value * reciprocal : value / absmax); }
};

template <class T>
inline Scale scale_of(const T* x, int64_t count, bool whole, float* absmax) {
  float top = largest(x, count), floor = at_least_smallest(top);
  *absmax = whole ? top : floor;
  return {floor, 1.0f / floor, whole};
}

}  // namespace hb
