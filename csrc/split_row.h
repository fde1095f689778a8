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
constexpr float kLog2ERest = 1.44269504088896341 - kLog2E;  // what a float cannot hold of log2(e)
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

// a * b, rounded: the compiler may not make it one half of a multiply-add.
MR1_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
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

// Statistics in powers of two: the logits' maximum, the sum of 2^d and that of 2^d * d with d = x * rate - level, where
// level = product(max, rate). So d is a single multiply-add. That the level is rounded costs no accuracy, as long as
// whatever follows is relative to that very number: of the maximum itself d is not quite 0.
using Levels = RowStats<float>;

MR1_HD Levels no_levels() { return {-INFINITY, 0.0f, 0.0f}; }

// d, but never less than kLevelFloor; a NaN stays one.
MR1_HD float exponent(float x, float level, float rate) { return max_or_nan(fmaf(x, rate, -level), kLevelFloor); }

// The same statistics relative to another, larger or equal maximum.
MR1_HD Levels rebased(const Levels& s, float max, float rate) {
  const float moved = product(s.max, rate) - product(base_of(max), rate);
  const float shift = max_or_nan(moved, kLevelFloor), kept = exp2_of(shift);
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
  const float level = product(base_of(top), rate);
  MR1_UNROLL
  for (int i = 0; i < W; ++i) {
    const float d = exponent(x[i], level, rate), e = exp2_of(d);
    s.sum += e;
    s.weighted += e * d;
  }
}

// What turns a logit into its gradient: 2^t * (base + slope * t) with t = x * rate - level.
struct Differentiation {
  float rate, level, base, slope;
};

// From p * (base + slope * log p), see RowGradient, where log2 p = x * rate - level - rest. `rest` is what `level` lost
// when it was rounded; it goes into the two factors, once a row.
MR1_HD Differentiation differentiation(const RowGradient<float>& g, float rate, float level, float rest) {
  const float kept = exp2_of(-rest), slope = g.slope * kLn2 * kept;
  return {rate, level, g.base * kept - slope * rest, slope};
}

// kBonus: whether the slope may be anything but 0.
template <bool kCap, bool kBonus, int W>
MR1_HD void differentiate(float (&x)[W], const Differentiation& d, float softcap) {
  MR1_UNROLL
  for (int i = 0; i < W; ++i) {
    const Capped<float> z = capped_logit<kCap>(x[i], softcap);
    if (kBonus) {
      const float t = exponent(z.y, d.level, d.rate);
      x[i] = exp2_of(t) * (d.base + d.slope * t);
    } else {
      x[i] = exp2_of(fmaf(z.y, d.rate, -d.level)) * d.base;
    }
    if (kCap) x[i] *= z.slope;
  }
}

}  // namespace mr1fast
