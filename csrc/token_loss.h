// The objective of one token with its derivative, the merging of row statistics, and the group-relative advantage, for
// host and device.
//
// This is the C++ spelling of kernels/reference.py and advantages.py, which define them. The CPU and the CUDA kernels
// both include it, and no formula of the loss may stand anywhere else in C++. It uses neither torch nor the STL, so
// that nvcc and any host compiler take it.
//
// F is float or, on a host, Floats (floats.h): four tokens at once. Conditions on F are therefore combined by & instead
// of &&, and turned into values by ?:, both sides of which are computed.
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

// exponentials.EXP_LIMIT: beyond it the exponential of a log-ratio, or of ref_logp - logp, stays at e^80. float32's
// overflows at e^88.7, and inf times a zero would be NaN. The derivative keeps the saturated value: it is finite and
// still points back.
constexpr float kExpLimit = 80.0f;

constexpr double kAdvantageEps = 1e-4;  // advantages.EPS

// In the order of policies.POLICIES and estimators.ESTIMATORS.
enum class Policy : int32_t { kClip, kCispo, kSapo, kCispo_two_sided, kDppo_tv, kDppo_kl };
enum class Estimator : int32_t { kK1, kAbs, kK2, kK3, kLow_var_kl };

constexpr float kLowVarKlLimit = 10.0f;  // estimators.LOW_VAR_KL_LIMIT

// What a token's objective is told besides its tensors, under the names of reference.SWITCHES and reference.NUMBERS and
// in their order (tests/test_settings.py compares them). Both arrive as lists: every member has 4 bytes.
struct Switches {
  Policy policy;
  Estimator estimator;
  int32_t use_bias_correction_kl;
};
struct Numbers {
  float epsilon_low, epsilon_high;
  float delta, clip_ratio_c;  // inf where there is none
  float sapo_temperature_pos, sapo_temperature_neg;
  float kl_clamp;  // inf where there is none
};
struct TokenSpec {
  Switches switches;
  Numbers numbers;
};

template <typename F>
struct TokenInput {
  F logp, old_logp, ref_logp;  // old_logp and ref_logp are read only if has_old, has_ref
  bool has_old, has_ref;
  F advantage, is_ratio, beta;
  F epsilon_low, epsilon_high;
};

template <typename F>
struct TokenLoss {
  F loss;  // policy term * is_ratio + beta * kl, without the normaliser
  F dloss_dlogp;
  F kl;                           // after bias correction; 0 without reference
  decltype(F{} < F{}) low, high;  // clipped from below, from above
};

MR1_HD float exp_of(float x) { return expf(x); }
MR1_HD float ln_of(float x) { return logf(x); }

// exp(x) - 1 to full relative precision. Where |x| < 0.35 exp(x) is near 1, and the subtraction would cancel its
// digits: there the Taylor series is summed, of which the first omitted term is below 0.35^7 / 8! = 2e-8 of the
// result.
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

// An estimate of the KL, its derivative with respect to logp, and the sum of the two.
template <typename F>
struct KlTerm {
  F kl, slope, slope_and_kl;
};

// From the log-ratio d = ref_logp - logp, of which d(d)/d(logp) = -1, and 0 where it is cut at kl_clamp.
template <typename F>
MR1_HD KlTerm<F> kl_term(F d, const TokenSpec& spec) {
  const F zero = F{}, limit = zero + kExpLimit, most = zero + spec.numbers.kl_clamp;
  const auto held = (d > most) | (d < -most);
  d = d > most ? most : (d < -most ? -most : d);
  F kl, slope, sum;
  const Estimator estimator = spec.switches.estimator;
  if (estimator == Estimator::kK3 || estimator == Estimator::kLow_var_kl) {
    const F growth = exp_minus_1(d > limit ? limit : d);
    kl = growth - d;
    slope = -growth;
    sum = -d;  // the exponentials cancel
    if (estimator == Estimator::kLow_var_kl) {
      const F bound = zero + kLowVarKlLimit;
      slope = kl > bound ? zero : slope;
      sum = kl > bound ? bound : sum;
      kl = kl > bound ? bound : kl;
    }
  } else {
    if (estimator == Estimator::kK1) {
      kl = -d;
      slope = zero + 1.0f;
    } else if (estimator == Estimator::kAbs) {
      kl = d < 0.0f ? -d : d;
      slope = d > 0.0f ? zero - 1.0f : (d < 0.0f ? zero + 1.0f : d);  // 0 at 0, NaN of NaN
    } else {
      kl = 0.5f * d * d;
      slope = -d;
    }
    sum = slope + kl;
  }
  return {kl, held ? zero : slope, held ? kl : sum};
}

// DPPO's conditions on the probability of a token: it rose too far, it fell too far.
template <typename F>
struct Moved {
  decltype(F{} < F{}) rose, fell;
};

// By the total variation or the KL of sampling this token or any other one.
template <typename F>
MR1_HD Moved<F> moved_too_far(F logp, F old_logp, const TokenInput<F>& in, Policy policy) {
  const F p = exp_of(logp), old_p = exp_of(old_logp);
  const F low = in.epsilon_low, high = in.epsilon_high;
  if (policy == Policy::kDppo_tv) return {p - old_p > high, p - old_p < -low};
  const F zero = F{}, least = zero - 1e30f;
  F rest = -exp_minus_1(logp), old_rest = -exp_minus_1(old_logp);
  rest = (rest < 0.0f ? zero : rest) + 1e-8f;  // rounding may have made it negative
  old_rest = (old_rest < 0.0f ? zero : old_rest) + 1e-8f;
  const F kl = old_p * ((old_logp < least ? least : old_logp) - logp) + (1.0f - old_p) * ln_of(old_rest / rest);
  return {(kl > high) & (p > old_p), (kl > low) & (p < old_p)};
}

// The slopes are derivatives with respect to logp; that of the ratio is the ratio itself.
template <typename F>
MR1_HD TokenLoss<F> token_loss(const TokenInput<F>& in, const TokenSpec& spec) {
  const Numbers& set = spec.numbers;
  const F zero = F{}, limit = zero + kExpLimit;
  const auto dead = in.logp == -INFINITY;  // the sampled token was banned: no derivative exists, so none is taken
  const F old_logp = in.has_old ? in.old_logp : in.logp;  // on-policy the ratio is 1, or NaN where logp is
  const F log_ratio = (dead & (old_logp == -INFINITY)) ? zero : in.logp - old_logp;
  const F ratio = exp_of(log_ratio > limit ? limit : log_ratio);
  const F a = in.advantage;

  TokenLoss<F> out{};
  F term, slope;
  if (spec.switches.policy == Policy::kClip) {
    const F lo = 1.0f - in.epsilon_low, hi = 1.0f + in.epsilon_high, delta = zero + set.delta;
    const F most = zero + set.clip_ratio_c;
    const auto beyond = (ratio > most) & (a < 0.0f);
    const F dual = beyond ? most : ratio;
    const F bounded = dual > delta ? delta : dual;
    const F clipped = dual < lo ? lo : (dual > hi ? hi : dual);
    const F free_term = bounded * a, clip_term = clipped * a;
    const F free_slope = ((dual > delta) | beyond) ? zero : a;
    const F clip_slope = ((dual < lo) | (dual > hi) | beyond) ? zero : a;
    // min(free, clipped) has the slope of the smaller one. Where they are equal it has none; torch.min, and with it the
    // reference, takes the mean of the two.
    const F mean = 0.5f * (free_slope + clip_slope);
    term = -(free_term < clip_term ? free_term : clip_term);
    slope = -(free_term < clip_term ? free_slope : (clip_term < free_term ? clip_slope : mean)) * ratio;
    out.low = (bounded < lo) & (a < 0.0f);
    out.high = (bounded > hi) & (a > 0.0f);
  } else if (spec.switches.policy == Policy::kCispo) {
    const F bound = in.epsilon_high;  // of the ratio itself
    const F weight = ratio > bound ? bound : ratio;  // a constant to the derivative
    term = dead ? zero : -weight * a * in.logp;
    slope = -weight * a;
    out.high = (ratio > bound) & (a > 0.0f);
  } else if (spec.switches.policy == Policy::kCispo_two_sided) {
    const F lo = 1.0f - in.epsilon_low, hi = 1.0f + in.epsilon_high;
    const F weight = ratio < lo ? lo : (ratio > hi ? hi : ratio);
    term = dead ? zero : -weight * a * in.logp;
    slope = -weight * a;
    out.low = ratio < lo;
    out.high = ratio > hi;
  } else if (spec.switches.policy == Policy::kDppo_tv || spec.switches.policy == Policy::kDppo_kl) {
    const Moved<F> moved = moved_too_far(in.logp, old_logp, in, spec.switches.policy);
    const auto positive = a > 0.0f;
    const F bound = zero + set.clip_ratio_c;
    out.low = positive ? zero > zero : moved.fell;
    out.high = moved.rose & positive;
    // Multiplied by 0, so that a NaN is not hidden.
    const F weight = (ratio > bound ? bound : ratio) * ((out.low | out.high) ? zero : zero + 1.0f);
    term = dead ? zero : -weight * a * in.logp;
    slope = -weight * a;
  } else {
    const F t = a > 0.0f ? zero + set.sapo_temperature_pos : zero + set.sapo_temperature_neg;
    const F gate = 1.0f / (1.0f + exp_of(-t * (ratio - 1.0f)));
    term = -gate * (4.0f / t) * a;
    slope = -4.0f * gate * (1.0f - gate) * a * ratio;  // gate' = t gate (1 - gate)
  }
  out.loss = term * in.is_ratio;
  out.dloss_dlogp = slope * in.is_ratio;

  if (in.has_ref) {
    const KlTerm<F> estimate = kl_term(in.ref_logp - in.logp, spec);
    F kl = estimate.kl, kl_slope = estimate.slope;
    if (spec.switches.use_bias_correction_kl) {
      kl_slope = estimate.slope_and_kl * ratio;
      kl = kl * ratio;
    }
    out.kl = dead ? zero : kl;
    // kl may be infinite where ref_logp is -inf; with beta 0 it is only reported.
    const auto off = in.beta == 0.0f;
    out.loss = out.loss + ((dead | off) ? zero : in.beta * kl);
    out.dloss_dlogp = out.dloss_dlogp + (off ? zero : in.beta * kl_slope);
  }
  out.dloss_dlogp = dead ? zero : out.dloss_dlogp;
  return out;
}

// The statistics of softmax over a part of a row, from which its log-sum-exp and its entropy follow: the maximum of z,
// the sum of exp(z - max), and the sum of exp(z - max) * (z - max). An empty part is {-inf, 0, 0}.
//   lse = max + log(sum)        entropy = lse - sum(p z) = log(sum) - weighted / sum
template <typename Real>
struct RowStats {
  Real max, sum, weighted;
};

// Two parts as one: the sums of the part with the smaller maximum are brought to the larger one.
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

// Gemma's soft cap of a logit, cap * tanh(x / cap), and its derivative; an infinite cap is none. A banned token (-inf)
// stays banned, without a gradient.
template <typename Real>
struct Capped {
  Real y, slope;
};

template <typename Real>
MR1_HD Capped<Real> capped(Real x, Real softcap) {
  if (softcap == INFINITY) return {x, (Real)1};
  const Real t = tanh(x / softcap);
  return {x == -INFINITY ? x : softcap * t, (Real)1 - t * t};
}

// d(loss)/d(logits) of a row. With c = d(loss)/d(logp) and e = -d(loss)/d(entropy), both over the temperature,
//   d(loss)/d(z_j) = c (1[j = id] - p_j) + e p_j (log p_j + entropy)
// which is p_j * (base + slope * log p_j) with base = e * entropy - c and slope = e; to the sampled token `hit` = c is
// added.
template <typename F>
struct RowGradient {
  F base, slope, hit;
};

// coef = d(loss)/d(logp), entropy_coef = -d(loss)/d(entropy) (the entropy bonus is subtracted from the loss).
template <typename F>
MR1_HD RowGradient<F> row_gradient(F coef, F entropy_coef, F entropy, F inv_temperature) {
  // A slope of exactly 0 must stay 0 where the entropy is NaN or infinite.
  const F bonus = entropy_coef == 0.0f ? F{} : entropy_coef * entropy;
  return {(bonus - coef) * inv_temperature, entropy_coef * inv_temperature, coef * inv_temperature};
}

// The whole gradient at the sampled token. Without an entropy bonus it is c (1 - p), and 1 - p has no digits left where
// p is nearly 1: hence -c * (exp(logp) - 1), by exp_minus_1.
template <typename F>
MR1_HD F sampled_gradient(const RowGradient<F>& g, F logp) {
  const F rest = g.base + g.hit;  // exactly 0 without an entropy bonus
  return logp == -INFINITY ? F{} : exp_of(logp) * (rest + g.slope * logp) - g.hit * exp_minus_1(logp);
}

enum class RewardScale : int32_t { kGroup, kBatch, kNone };  // in the order of advantages.SCALE_REWARDS

// Of the rewards that are not NaN (a NaN reward is an absent one): one of them, the mean of their differences from it,
// and their unbiased standard deviation. Equal rewards differ by exactly 0, and so does their mean from each of them;
// their sum divided by their number need not equal them.
struct Moments {
  double first, mean_beyond_first, std;
};

MR1_HD Moments reward_moments(const float* rewards, int64_t n) {
  double first = 0.0, sum = 0.0, squares = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (rewards[i] != rewards[i]) continue;
    if (count++ == 0) first = rewards[i];
    sum += rewards[i] - first;
  }
  const double mean = count ? sum / count : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double centred = rewards[i] - first - mean;
    if (rewards[i] == rewards[i]) squares += centred * centred;
  }
  return {first, mean, count > 1 ? sqrt(squares / (count - 1)) : 0.0};
}

// `batch` is read only where it gives the scale.
MR1_HD float group_advantage(float reward, const Moments& group, const Moments& batch, RewardScale scale) {
  if (reward != reward) return 0.0f;
  const double centred = reward - group.first - group.mean_beyond_first;
  if (scale == RewardScale::kNone) return (float)centred;
  return (float)(centred / ((scale == RewardScale::kGroup ? group : batch).std + kAdvantageEps));
}

}  // namespace mr1fast
