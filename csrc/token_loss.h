// The objective of one token, the merge of row statistics and the group-relative advantage, for host and device.
//
// This is the C++ spelling of kernels/reference.py (the definition); the CPU and the CUDA kernel both include it, and
// nothing else in C++ may contain a formula of the loss. No torch and no STL: nvcc and any host compiler take it.
//
// F is float, or on a host Floats (floats.h): four tokens at once. Conditions on F are therefore joined by & and chosen
// between by ?:, whose two sides may both be computed.
#pragma once

#include <math.h>
#include <stdint.h>

#ifndef __CUDACC__
#include "floats.h"
#endif

#ifdef __CUDACC__
#define MR1_HD __host__ __device__ __forceinline__
#else
#define MR1_HD inline
#endif

namespace mr1fast {

// exp of a log-ratio or of (ref - logp) saturates here: float32 holds exp(88), and an infinite one would turn into NaN
// in the product with a zero. The derivative keeps the saturated value, so that the slope stays finite and points back.
constexpr float kExpLimit = 80.0f;

// Added to the standard deviation of the rewards, as TRL does.
constexpr double kAdvantageEps = 1e-4;

enum class Policy : int { kClip = 0, kCispo = 1, kSapo = 2 };  // kClip: grpo, bnpo, dr_grpo, dapo, luspo

struct TokenSpec {
  Policy policy;
  float epsilon_low, epsilon_high;
  float delta;  // upper bound of the ratio in the unclipped term; +inf for none
  bool bias_correction;  // kl *= ratio
  float sapo_temperature_pos, sapo_temperature_neg;
};

template <typename F>
struct TokenInput {
  F logp, old_logp, ref_logp;  // old_logp and ref_logp are read only if has_old, has_ref
  bool has_old, has_ref;
  F advantage, is_ratio;
  float beta;
};

template <typename F>
struct TokenLoss {
  F loss;  // policy term * is_ratio + beta * kl, without the normaliser
  F dloss_dlogp;
  F kl;                        // after bias correction; 0 without reference
  decltype(F{} < F{}) low, high;  // clipped from below, from above
};

MR1_HD float exp_of(float x) { return expf(x); }

// exp(x) - 1, with all its digits near 0.
template <typename F>
MR1_HD F exp_minus_1(F x) {
  F p = F{} + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  return ((x > -0.35f) & (x < 0.35f)) ? x + x * x * p : exp_of(x) - 1.0f;
}

template <typename F>
MR1_HD TokenLoss<F> token_loss(const TokenInput<F>& in, const TokenSpec& spec) {
  const F zero = F{}, limit = zero + kExpLimit;
  const auto dead = in.logp == -INFINITY;  // the sampled token was banned: no derivative exists, so none is taken
  const F old_logp = in.has_old ? in.old_logp : in.logp;  // on-policy the ratio is 1, or NaN for all to see
  const F log_ratio = (dead & (old_logp == -INFINITY)) ? zero : in.logp - old_logp;
  const F ratio = exp_of(log_ratio > limit ? limit : log_ratio);
  const F a = in.advantage;

  TokenLoss<F> out{};
  F term, slope;
  if (spec.policy == Policy::kClip) {
    const F lo = zero + (1.0f - spec.epsilon_low), hi = zero + (1.0f + spec.epsilon_high), delta = zero + spec.delta;
    const F bounded = ratio > delta ? delta : ratio;
    const F clipped = ratio < lo ? lo : (ratio > hi ? hi : ratio);
    const F free_term = bounded * a, clip_term = clipped * a;
    const F free_slope = ratio > delta ? zero : a;
    const F clip_slope = ((ratio < lo) | (ratio > hi)) ? zero : a;
    // Where the two are equal the derivative is their mean, which is what torch.minimum takes.
    const F mean = 0.5f * (free_slope + clip_slope);
    term = -(free_term < clip_term ? free_term : clip_term);
    slope = -(free_term < clip_term ? free_slope : (clip_term < free_term ? clip_slope : mean)) * ratio;
    out.low = (bounded < lo) & (a < 0.0f);
    out.high = (bounded > hi) & (a > 0.0f);
  } else if (spec.policy == Policy::kCispo) {
    const F bound = zero + spec.epsilon_high;  // the bound itself
    const F weight = ratio > bound ? bound : ratio;
    term = dead ? zero : -weight * a * in.logp;
    slope = -weight * a;
    out.high = (ratio > bound) & (a > 0.0f);
  } else {
    const F t = a > 0.0f ? zero + spec.sapo_temperature_pos : zero + spec.sapo_temperature_neg;
    const F gate = 1.0f / (1.0f + exp_of(-t * (ratio - 1.0f)));
    term = -gate * (4.0f / t) * a;
    slope = -4.0f * gate * (1.0f - gate) * a * ratio;
  }
  out.loss = term * in.is_ratio;
  out.dloss_dlogp = slope * in.is_ratio;

  if (in.has_ref) {
    const F d = in.ref_logp - in.logp;
    const F growth = exp_minus_1(d > limit ? limit : d);
    F kl = growth - d, kl_slope = -growth;
    if (spec.bias_correction) {
      kl_slope = -d * ratio;  // d(kl * ratio) / d(logp) = (-growth + kl) * ratio
      kl = kl * ratio;
    }
    out.kl = dead ? zero : kl;
    if (in.beta != 0.0f) {  // kl may be infinite where ref_logp is -inf; with beta 0 it is only reported
      out.loss = out.loss + (dead ? zero : in.beta * kl);
      out.dloss_dlogp = out.dloss_dlogp + in.beta * kl_slope;
    }
  }
  out.dloss_dlogp = dead ? zero : out.dloss_dlogp;
  return out;
}

// Running statistics of softmax over part of a row: z's maximum, sum of exp(z - max), sum of exp(z - max) * (z - max).
// An empty part is {-inf, 0, 0}.
template <typename Real>
struct RowStats {
  Real max, sum, weighted;
};

template <typename Real>
MR1_HD RowStats<Real> merge(const RowStats<Real>& a, const RowStats<Real>& b) {
  if (b.max == -INFINITY) return a;
  if (a.max == -INFINITY) return b;
  const bool a_larger = a.max > b.max;
  const RowStats<Real>& big = a_larger ? a : b;
  const RowStats<Real>& small = a_larger ? b : a;
  const Real shift = small.max - big.max, scale = (Real)exp(shift);
  return {big.max, big.sum + scale * small.sum, big.weighted + scale * (small.weighted + shift * small.sum)};
}

// d(loss)/d(logits) away from the sampled token is p * (base + slope * log p); the sampled token gets `hit` added.
template <typename F>
struct RowGradient {
  F base, slope, hit;
};

// coef = d(loss)/d(logp), entropy_coef = -d(loss)/d(entropy) (the entropy bonus is subtracted from the loss).
template <typename F>
MR1_HD RowGradient<F> row_gradient(F coef, F entropy_coef, F entropy, float inv_temperature) {
  // A slope of exactly 0 must stay 0 where the entropy is NaN or infinite.
  const F bonus = entropy_coef == 0.0f ? F{} : entropy_coef * entropy;
  return {(bonus - coef) * inv_temperature, entropy_coef * inv_temperature, coef * inv_temperature};
}

// The whole gradient at the sampled token. Where p is nearly 1, 1 - p has no digits left.
template <typename F>
MR1_HD F sampled_gradient(const RowGradient<F>& g, F logp) {
  const F rest = g.base + g.hit;  // exactly 0 without an entropy bonus
  return logp == -INFINITY ? F{} : exp_of(logp) * (rest + g.slope * logp) - g.hit * exp_minus_1(logp);
}

struct Moments {
  double mean, std;
};

// Mean and unbiased standard deviation of the rewards that are not NaN (a NaN reward is an absent one).
MR1_HD Moments reward_moments(const float* rewards, int64_t n) {
  double sum = 0.0, squares = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (rewards[i] == rewards[i]) {
      sum += rewards[i];
      ++count;
    }
  }
  const double mean = count ? sum / count : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (rewards[i] == rewards[i]) squares += (rewards[i] - mean) * (rewards[i] - mean);
  }
  return {mean, count > 1 ? sqrt(squares / (count - 1)) : 0.0};
}

// scale: divide by the standard deviation `std` (of the group or of the batch); otherwise only the group's mean goes.
MR1_HD float group_advantage(float reward, double group_mean, bool scale, double std) {
  if (!(reward == reward)) return 0.0f;
  const double centred = reward - group_mean;
  return (float)(scale ? centred / (std + kAdvantageEps) : centred);
}

}  // namespace mr1fast
