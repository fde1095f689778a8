// The two 16-bit formats, by bit pattern, and their scalar conversions: round to nearest even, NaN stays NaN.
#pragma once

#include <stdint.h>
#include <string.h>

namespace mr1fast {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return bits_float((uint32_t)x.bits << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) {  // subnormal: mantissa * 2^-24, exact
    const float magnitude = (float)mantissa * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, BFloat16* out) {
  const uint32_t u = float_bits(x);
  out->bits = x == x ? (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16) : (uint16_t)((u >> 16) | 0x40);
}

inline void from_float(float x, Float16* out) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at 2^-24 and leaves the mantissa in the low bits
    h = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    h = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | h);
}

}  // namespace mr1fast
