// A token of the loss head on CUDA: where its row lies, how the threads of a block bring their statistics together, and
// what follows from the row's statistics: the token's outputs and the plan of its gradient. The objective is in
// token_loss.h, the arithmetic of a row in split_row.h.
#pragma once

#ifdef MR1_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include "cuda_primitives.h"
#endif

#include "grpo_cuda.h"
#include "split_row.h"

namespace mr1fast {
namespace {

using Call = Mr1RowsCall;

template <typename T>
constexpr int kWidth = 16 / (int)sizeof(T);

// ---- one row --------------------------------------------------------------------------------------------------------

struct Row {
  int64_t b, l, at;
  bool live;  // not masked
};

MR1_DEVICE Row row_of(const Call& call, int64_t index) {
  Row row;
  row.b = index / call.L;
  row.l = index - row.b * call.L;
  row.at = index;
  row.live = !call.mask || call.mask[index];
  return row;
}

template <typename T>
MR1_DEVICE const T* logits_of(const Call& call, const Row& row) {
  return (const T*)call.logits + row.b * call.logits_stride_b + row.l * call.logits_stride_l;
}
template <typename T>
MR1_DEVICE T* grad_of(const Call& call, const Row& row) {
  return (T*)call.grad + row.b * call.grad_stride_b + row.l * call.grad_stride_l;
}

MR1_DEVICE float rate_of(const Call& call, const Row& row) {
  return call.temperatures ? kLog2E / call.temperatures[row.at] : call.rate;
}
MR1_DEVICE float inv_temperature_of(const Call& call, const Row& row) {
  return call.temperatures ? 1.0f / call.temperatures[row.at] : call.inv_temperature;
}

struct Scratch {
  float max[32], sum[32], weighted[32];  // one per warp
};

MR1_DEVICE float warp_max(float x) {
  MR1_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = max_or_nan(x, from_lane(x, mask));
  return x;
}
MR1_DEVICE float warp_sum(float x) {
  MR1_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += from_lane(x, mask);
  return x;
}

// Every thread's statistics in one, the same for all threads of the block.
MR1_DEVICE Levels reduce(Levels s, float rate, Scratch& scratch) {
  const int warp = thread() / 32, lane = thread() % 32, warps = threads() / 32;
  float top = warp_max(s.max);
  if (lane == 0) scratch.max[warp] = top;
  barrier();
  top = warp_max(lane < warps ? scratch.max[lane] : -INFINITY);
  s = rebased(s, top, rate);
  s.sum = warp_sum(s.sum);
  s.weighted = warp_sum(s.weighted);
  if (lane == 0) {
    scratch.sum[warp] = s.sum;
    scratch.weighted[warp] = s.weighted;
  }
  barrier();
  const float sum = lane < warps ? scratch.sum[lane] : 0.0f, weighted = lane < warps ? scratch.weighted[lane] : 0.0f;
  return {top, warp_sum(sum), warp_sum(weighted)};
}

// ---- one token, by one thread ---------------------------------------------------------------------------------------

struct Token {
  int64_t id;
  Capped<float> x_id;  // the id's logit
  float weight, entropy_weight;
  TokenInput<float> in;
};

// A token's value in a [B, L] tensor with strides, or what holds where there is no such tensor.
MR1_DEVICE float at(const float* values, const Row& row, int64_t stride_b, int64_t stride_l, float otherwise) {
  return values ? values[row.b * stride_b + row.l * stride_l] : otherwise;
}

// Everything small is loaded before the row, behind whose latency its own hides; and in place the id's logit is soon
// gone.
template <bool kCap, typename T>
MR1_DEVICE Token load_token(const Call& call, const Row& row, const T* logits) {
  Token t{};
  t.id = call.ids[row.at];
  require(t.id >= 0 && t.id < call.V);
  t.x_id = capped_logit<kCap>(read_one(logits + t.id), call.softcap);
  if (!call.token_weight) return t;  // scoring
  t.weight = at(call.token_weight, row, call.weight_stride_b, call.weight_stride_l, 1.0f);
  t.entropy_weight = call.entropy_weight ? *call.entropy_weight : 0.0f;
  t.in.has_old = call.old_logps;
  t.in.has_ref = call.ref_logps;
  if (call.old_logps) t.in.old_logp = call.old_logps[row.at];
  if (call.ref_logps) t.in.ref_logp = call.ref_logps[row.at];
  t.in.advantage = call.advantages ? at(call.advantages, row, call.advantage_stride_b, call.advantage_stride_l, 0.0f)
                                   : call.advantage_space[row.b];
  t.in.is_ratio = at(call.is_ratio, row, call.is_ratio_stride_b, call.is_ratio_stride_l, 1.0f);
  t.in.beta = at(call.beta, row, call.beta_stride_b, call.beta_stride_l, 0.0f);
  const Numbers& set = call.spec.numbers;
  t.in.epsilon_low = at(call.epsilon_low, row, call.epsilon_low_stride_b, call.epsilon_low_stride_l, set.epsilon_low);
  t.in.epsilon_high =
      at(call.epsilon_high, row, call.epsilon_high_stride_b, call.epsilon_high_stride_l, set.epsilon_high);
  return t;
}

// How a row's logits become its gradient.
struct Plan {
  Differentiation d;
  float sampled;  // the gradient at the id, which stands
  int64_t id_vector;  // in this 16-byte vector of the block's part of the row (cluster only), or in another block's
  int id_lane;
  bool zero;
};

MR1_DEVICE Plan plan_of(
    const RowGradient<float>& g, const Token& t, bool zero, float logp, float row_base, float log_sum, float rate) {
  return {differentiation(g, row_base, log_sum, rate), sampled_gradient(g, logp) * t.x_id.slope, 0, 0, zero};
}

// From the row's statistics, relative to row_base, its maximum: the token's outputs, which are stored, and the plan.
MR1_DEVICE Plan finish(
    const Call& call, const Row& row, const Token& t, const RowStats<float>& s, float row_base, bool store) {
  const float inv_temperature = inv_temperature_of(call, row), rate = rate_of(call, row);
  const float log_sum = logf(s.sum), entropy = log_sum - s.weighted / s.sum;  // the maximum is 0
  const float logp = (t.x_id.y - row_base) * inv_temperature - log_sum;
  if (store) {
    call.logps[row.at] = logp;
    call.entropies[row.at] = entropy;
    if (call.lse) call.lse[row.at] = row_base * inv_temperature + log_sum;
  }
  if (!call.token_weight) return {};
  TokenInput<float> in = t.in;
  in.logp = logp;
  const TokenLoss<float> loss = token_loss(in, call.spec);
  const float coef = t.weight * loss.dloss_dlogp;
  if (store) {
    call.share[row.at] = t.weight * loss.loss - (t.entropy_weight == 0.0f ? 0.0f : t.entropy_weight * entropy);
    call.loss[row.at] = loss.loss;
    if (call.kl) call.kl[row.at] = loss.kl;
    call.coef[row.at] = coef;
    call.is_low[row.at] = loss.low;
    call.is_high[row.at] = loss.high;
  }
  const RowGradient<float> g = row_gradient(coef, t.entropy_weight, entropy, inv_temperature);
  return plan_of(g, t, coef == 0.0f && t.entropy_weight == 0.0f, logp, row_base, log_sum, rate);
}

MR1_DEVICE void clear_outputs(const Call& call, const Row& row) {
  float* const values[] = {call.share, call.loss, call.logps, call.entropies, call.kl, call.coef, call.lse};
  for (float* p : values) {
    if (p) p[row.at] = 0.0f;
  }
  if (call.is_low) call.is_low[row.at] = call.is_high[row.at] = false;
}

// rewards [B] -> advantages [B], a thread for each. Rewards are few: it runs through its whole group, or the whole
// batch.
MR1_KERNEL void advantage_kernel(const Call call) {
  const int64_t b = block() * threads() + thread();
  if (b >= call.B) return;
  const int64_t G = call.num_generations;
  const RewardScale scale = (RewardScale)call.scale_rewards;
  const Moments group = reward_moments(call.rewards + b / G * G, G);
  const Moments batch = scale == RewardScale::kBatch ? reward_moments(call.rewards, call.B) : Moments{};
  call.advantage_space[b] = group_advantage(call.rewards[b], group, batch, scale);
}

}  // namespace
}  // namespace mr1fast
