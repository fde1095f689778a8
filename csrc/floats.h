// Four floats at once, in GCC's vector extension (also Clang's), with the two functions that a token needs. Every
// machine has vectors of this width, so that no instruction set need be chosen.
#pragma once

#include <math.h>
#include <stdint.h>

namespace mr1fast {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Ints bits_of(Floats x) { return (Ints)x; }

// The integers nearest to x, and those integers as floats, for |x| < 2^22.
struct Rounded {
  Ints integer;
  Floats value;
};
inline Rounded rounded(Floats x) {
  const Floats magic = Floats{} + 0x1.8p23f, shifted = x + magic;
  return {bits_of(shifted) - bits_of(magic), shifted - magic};
}

// Within 1 unit in the last place of exp(x); 0 below -87 (exp is denormal there), inf above 88.7, NaN of NaN.
inline Floats exp_of(Floats x) {
  const Floats zero = Floats{}, low = zero - 87.0f, high = zero + 88.72f, inf = zero + INFINITY;
  const Floats bounded = x < low ? low : (x > high ? high : x);
  const Rounded n = rounded(bounded * 1.44269504f);
  // ln 2 in two parts, the first of few enough digits to make its product exact.
  const Floats r = (bounded - n.value * 0x1.62e4p-1f) - n.value * 0x1.7f7d1cp-20f;
  Floats p = zero + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * r * r + r) + 1.0f;
  const Floats scaled = (Floats)(bits_of(p) + (n.integer << 23));
  return x < low ? zero : (x > high ? inf : scaled);
}

// log(x) as a sum: `most`, a multiple of ln 2, and the rest, whose error is below 1e-7. For x >= 2^-126; NaN of NaN.
struct Logarithm {
  Floats most, rest;
};
inline Logarithm log_of(Floats x) {
  const Floats zero = Floats{};
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)).
  const Ints n = (bits_of(x) - bits_of(zero + 0x1.6a09e6p-1f)) >> 23;
  const Floats m = (Floats)(bits_of(x) - (n << 23));
  // log m = 2 atanh(t) with t = (m - 1) / (m + 1), |t| < 0.1716
  const Floats t = (m - 1.0f) / (m + 1.0f), u = t * t;
  Floats p = zero + 2.0f / 9.0f;
  p = p * u + 2.0f / 7.0f;
  p = p * u + 2.0f / 5.0f;
  p = p * u + 2.0f / 3.0f;
  const Floats exponent = {(float)n[0], (float)n[1], (float)n[2], (float)n[3]};
  const Floats rest = (p * u * t + 2.0f * t) + exponent * 0x1.7f7d1cp-20f;
  return {exponent * 0x1.62e4p-1f, rest + (x - x)};  // NaN also of inf
}
inline Floats ln_of(Floats x) {
  const Logarithm log = log_of(x);
  return log.most + log.rest;
}

}  // namespace mr1fast
