// The arithmetic of a row that many threads share: each visits vectors of logits, their statistics are brought to one
// maximum and added, and each turns its vectors into gradient. For the CUDA kernels; runs on any host for the tests.
//
// Exponentials are to base 2 with the temperature folded in: exp(x / temperature) = exp2(x * rate).
#pragma once

#include "token_loss.h"

#ifdef __CUDA_ARCH__
#define MR1_UNROLL _Pragma("unroll")
#else
#define MR1_UNROLL
#endif

namespace mr1fast {

constexpr float kLn2 = 0.69314718055994531f, kLog2E = 1.44269504088896341f;
constexpr float kLevelFloor = -256.0f;  // exp2 of it is 0, while 0 * kLevelFloor is 0 and not NaN

MR1_HD float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// The larger one, or NaN if either is.
MR1_HD float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || a > b ? a : b;
#endif
}

// log2 of exp((x - base) / temperature), from below never less than kLevelFloor; a NaN stays one.
MR1_HD float exponent(float x, float base, float rate) {
  return max_or_nan((x - base) * rate, kLevelFloor);
}

// a / b for b >= 1.
MR1_HD float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b > 1e37f ? 1e37f : b);  // which would make NaN of an infinite b; a NaN stays one
#else
  return a / b;
#endif
}

// A logit after the soft cap as in token_loss.h, with tanh(u) as 1 - 2 / (1 + e^2u), to 2e-7 of 1. kCap: there is one.
template <bool kCap>
MR1_HD Capped<float> capped_logit(float x, float softcap) {
  if (!kCap) return {x, 1.0f};
  const float t = 1.0f - quotient(2.0f, 1.0f + exp2_of(x * (2.0f * kLog2E / softcap)));
  return {x == -INFINITY ? x : softcap * t, 1.0f - t * t};
}

// What statistics are taken relative to: the maximum, unless nothing but banned tokens (-inf) has been seen.
MR1_HD float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

// Statistics with the logits' own maximum and `weighted` in powers of two: sum of 2^d * d with d = (x - max) * rate.
using Levels = RowStats<float>;

MR1_HD Levels no_levels() { return {-INFINITY, 0.0f, 0.0f}; }

// The same statistics relative to another, larger or equal maximum.
MR1_HD Levels rebased(const Levels& s, float max, float rate) {
  const float shift = exponent(s.max, base_of(max), rate), kept = exp2_of(shift);
  return {max, kept * s.sum, kept * (s.weighted + shift * s.sum)};
}

template <bool kCap, int W>
MR1_HD void visit(Levels& s, float (&x)[W], float rate, float softcap) {
  MR1_UNROLL
  for (int i = 0; i < W; ++i) x[i] = capped_logit<kCap>(x[i], softcap).y;
  float top = s.max;
  MR1_UNROLL
  for (int i = 0; i < W; ++i) top = max_or_nan(top, x[i]);
  s = rebased(s, top, rate);
  const float base = base_of(top);
  MR1_UNROLL
  for (int i = 0; i < W; ++i) {
    const float d = exponent(x[i], base, rate), e = exp2_of(d);
    s.sum += e;
    s.weighted += e * d;
  }
}

// A part's statistics as token_loss.h merges them: natural logarithms, maximum over temperature relative to the row's.
MR1_HD RowStats<float> relative(const Levels& part, float row_base, float inv_temperature) {
  return {(part.max - row_base) * inv_temperature, part.sum, part.weighted * kLn2};
}

// What turns a logit into its gradient: p * (base + slope * log p), see RowGradient.
struct Differentiation {
  float row_base, log2_sum, rate;
  float base, slope;
};

MR1_HD Differentiation differentiation(const RowGradient<float>& g, float row_base, float log_sum, float rate) {
  return {row_base, log_sum * kLog2E, rate, g.base, g.slope * kLn2};
}

template <bool kCap, int W>
MR1_HD void differentiate(float (&x)[W], const Differentiation& d, float softcap) {
  MR1_UNROLL
  for (int i = 0; i < W; ++i) {
    const Capped<float> z = capped_logit<kCap>(x[i], softcap);
    const float log2_p = exponent(z.y, d.row_base, d.rate) - d.log2_sum;
    x[i] = exp2_of(log2_p) * (d.base + d.slope * log2_p);
    if (kCap) x[i] *= z.slope;
  }
}

}  // namespace mr1fast
