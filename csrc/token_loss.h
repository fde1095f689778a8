// The objective of one token, the merge of row statistics and the group-relative advantage, for host and device.
//
// This is the C++ spelling of kernels/reference.py (the definition); the CPU and the CUDA kernel both include it, and
// nothing else in C++ may contain a formula of the loss. No torch and no STL: nvcc and any host compiler take it.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
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

struct TokenInput {
  float logp, old_logp, ref_logp;  // old_logp and ref_logp are read only if has_old, has_ref
  bool has_old, has_ref;
  float advantage, is_ratio, beta;
};

struct TokenLoss {
  float loss;        // policy term * is_ratio + beta * kl, without the normaliser
  float dloss_dlogp;
  float kl;          // after bias correction; 0 without reference
  bool low, high;    // clipped from below, from above
};

// exp(x) - 1, with all its digits near 0. Several times faster than glibc's expm1f, and short rows notice.
MR1_HD float exp_minus_1(float x) {
  if (!(x > -0.35f && x < 0.35f)) return expf(x) - 1.0f;
  float p = 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  return x + x * x * p;
}

MR1_HD TokenLoss token_loss(const TokenInput& in, const TokenSpec& spec) {
  const float inf = INFINITY;
  const bool dead = in.logp == -inf;  // the sampled token was banned: no derivative exists, so none is taken
  float log_ratio = in.has_old ? in.logp - in.old_logp : 0.0f;
  if (in.has_old && dead && in.old_logp == -inf) log_ratio = 0.0f;
  const float ratio = expf(log_ratio > kExpLimit ? kExpLimit : log_ratio);
  const float a = in.advantage;

  TokenLoss out{0.0f, 0.0f, 0.0f, false, false};
  float term, slope;
  if (spec.policy == Policy::kClip) {
    const float lo = 1.0f - spec.epsilon_low, hi = 1.0f + spec.epsilon_high;
    const float bounded = ratio > spec.delta ? spec.delta : ratio;
    const float clipped = ratio < lo ? lo : (ratio > hi ? hi : ratio);
    const float free_term = bounded * a, clip_term = clipped * a;
    const float free_slope = ratio > spec.delta ? 0.0f : a;
    const float clip_slope = (ratio < lo || ratio > hi) ? 0.0f : a;
    // Where the two are equal the derivative is their mean, which is what torch.minimum takes.
    const bool equal = !(free_term < clip_term) && !(clip_term < free_term);
    term = -(free_term < clip_term ? free_term : clip_term);
    slope = -(equal ? 0.5f * (free_slope + clip_slope) : (free_term < clip_term ? free_slope : clip_slope)) * ratio;
    out.low = bounded < lo && a < 0.0f;
    out.high = bounded > hi && a > 0.0f;
  } else if (spec.policy == Policy::kCispo) {
    const float weight = ratio > spec.epsilon_high ? spec.epsilon_high : ratio;  // eps_high is the bound itself
    term = dead ? 0.0f : -weight * a * in.logp;
    slope = -weight * a;
    out.high = ratio > spec.epsilon_high && a > 0.0f;
  } else {
    const float t = a > 0.0f ? spec.sapo_temperature_pos : spec.sapo_temperature_neg;
    const float gate = 1.0f / (1.0f + expf(-t * (ratio - 1.0f)));
    term = -gate * (4.0f / t) * a;
    slope = -4.0f * gate * (1.0f - gate) * a * ratio;
  }
  out.loss = term * in.is_ratio;
  out.dloss_dlogp = slope * in.is_ratio;

  if (in.has_ref && !dead) {
    const float d = in.ref_logp - in.logp;
    const float growth = exp_minus_1(d > kExpLimit ? kExpLimit : d);
    float kl = growth - d, kl_slope = -growth;
    if (spec.bias_correction) {
      kl_slope = -d * ratio;  // d(kl * ratio) / d(logp) = (-growth + kl) * ratio
      kl = kl * ratio;
    }
    out.kl = kl;
    if (in.beta != 0.0f) {  // kl may be infinite where ref_logp is -inf; with beta 0 it is only reported
      out.loss += in.beta * kl;
      out.dloss_dlogp += in.beta * kl_slope;
    }
  }
  if (dead) out.dloss_dlogp = 0.0f;
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
struct RowGradient {
  float base, slope, hit;
};

// coef = d(loss)/d(logp), entropy_coef = -d(loss)/d(entropy) (the entropy bonus is subtracted from the loss).
MR1_HD RowGradient row_gradient(float coef, float entropy_coef, float entropy, float inv_temperature) {
  // A slope of exactly 0 must stay 0 where the entropy is NaN or infinite.
  const float bonus = entropy_coef == 0.0f ? 0.0f : entropy_coef * entropy;
  return {(bonus - coef) * inv_temperature, entropy_coef * inv_temperature, coef * inv_temperature};
}

// The whole gradient at the sampled token. Where p is nearly 1, 1 - p has no digits left.
MR1_HD float sampled_gradient(const RowGradient& g, float logp) {
  if (logp == -INFINITY) return 0.0f;
  const float rest = g.base + g.hit;  // exactly 0 without an entropy bonus
  return expf(logp) * (rest + g.slope * logp) - g.hit * exp_minus_1(logp);
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
