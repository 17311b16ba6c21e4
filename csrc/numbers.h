// Conversions between float and its 16-bit relatives, rounding half to even: what every kernel agrees on.
#pragma once

#include <cstdint>
#include <cstring>

namespace hb {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The three types a weight may have outside its blocks. Each says how it is stored, read and written.
struct BFloat16 {
  uint16_t raw;
  static float read(BFloat16 value) { return float_of(uint32_t(value.raw) << 16); }
  static BFloat16 write(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
};

struct Float16 {
  uint16_t raw;
  static float read(Float16 value) {
    uint32_t sign = uint32_t(value.raw & 0x8000) << 16, rest = value.raw & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return float_of(sign | ((rest << 13) + 0x38000000));
    float tiny = float(rest) * 0x1p-24f;
    return float_of(sign | bits_of(tiny));
  }
  static Float16 write(float value) {
    uint32_t bits = bits_of(value), rest = bits & 0x7fffffff;
    uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (rest >= 0x47800000) return {uint16_t(sign | 0x7c00)};
    // Below 2^-14 a half has steps of 2^-24, and so has a float of 0.5: adding it does the rounding.
    if (rest < 0x38800000) return {uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
  }
};

struct Float32 {
  float raw;
  static float read(Float32 value) { return value.raw; }
  static Float32 write(float value) { return {value}; }
};

}  // namespace hb
