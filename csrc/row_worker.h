// One thread's part of the loss head on the CPU: what happens between the rows that row_kernels.h runs over, from
// statistics to the token's outputs and on to the plan of its gradient.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <new>

#include "grpo_cpu.h"
#include "half.h"
#include "row_step.h"

namespace mr1fast {

inline size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline float read(const char* row, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ((const float*)row)[i];
    case DType::kBFloat16: return to_float(((const BFloat16*)row)[i]);
    default: return to_float(((const Float16*)row)[i]);
  }
}

inline void write(char* row, int64_t i, DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat32: return from_float(value, (float*)row + i);
    case DType::kBFloat16: return from_float(value, (BFloat16*)row + i);
    default: return from_float(value, (Float16*)row + i);
  }
}

constexpr int64_t kLongRow = 1 << 18;  // bytes: a second-level cache holds only a few rows of this length

struct Free {
  void operator()(void* p) const { free(p); }
};

template <typename T>
std::unique_ptr<T[], Free> allocate(int64_t n) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, n * sizeof(T)) != 0) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>((T*)p);
}

// One thread's work, with some rows in flight: pass 1 of these rows, then their tokens, then pass 2 of each together
// with pass 1 of the row that takes its slot. Long rows have one slot. Short ones have several, because a token is a
// chain of logarithms and exponentials behind which a short row cannot hide: the tokens of several rows are computed
// together.
class Job::Worker {
 public:
  explicit Worker(Job& job)
      : job_(job),
        x_(job.logits_),
        row_bytes_(x_.V * (int64_t)element_size(x_.dtype)),
        blocks_((x_.V + kBlock - 1) / kBlock),
        slots_(blocks_ > 1 ? 1 : kLanes),
        stats_(allocate<RowStats<float>>(slots_ * blocks_)),
        scale_(allocate<float>(slots_ * blocks_)) {
    const bool in_place = x_.z.data == x_.grad.data;
    // An entropy bonus makes the gradient more than a multiple of the exponentials.
    keep_exponentials_ = x_.grad && job.objective_ && job.objective_->entropy_weight == 0.0f;
    // Streaming past the cache saves reading what is overwritten. Short rows would pay for it: the sampled token's
    // value is written afterwards, to a line that is still on its way to memory.
    stream_ = keep_exponentials_ && !in_place && row_bytes_ >= 32768;
    // The exponentials have memory of their own, which stays in the second-level cache. Beside those of a long float32
    // row its logits would not stay there too, so these exponentials overwrite the logits.
    over_logits_ = keep_exponentials_ && in_place && x_.dtype == DType::kFloat32 && row_bytes_ > kLongRow;
    if (keep_exponentials_ && !over_logits_) e_ = allocate<float>(slots_ * blocks_ * kBlock);
    for (int k = 0; k < slots_; ++k) {
      slot_[k].stats = &stats_[k * blocks_];
      slot_[k].scale = &scale_[k * blocks_];
      slot_[k].e = e_ ? &e_[k * blocks_ * kBlock] : nullptr;
    }
  }

  void forward(int64_t b, int64_t l);
  void score_backward(int64_t b, int64_t l);
  void finish() {
    settle();
    for (int k = 0; k < slots_; ++k) {
      if (slot_[k].out) step(slot_[k], nullptr, nullptr);
    }
  }

 private:
  struct Slot {
    RowStats<float>* stats;  // one per block
    float* scale;            // likewise
    float* e;                // one per logit
    int64_t b, l, id;
    const char* z;
    double inv_temperature;
    double sampled;     // the id's logit, capped, over temperature
    float sampled_cap;  // the slope of its cap
    char* out = nullptr;  // where pass 2 is still to write
    float sampled_value;  // the gradient at the id
  };

  // What is known of the rows in flight once they have been read.
  struct Scores {
    RowStats<double> rows[kLanes];
    float top[kLanes];  // the maximum of the logits
    Floats sum, logp, entropy;
    Logarithm log_sum;
  };

  void step(Slot& slot, const char* z, float* e) {
    Step step;
    step.z = z;
    step.stats = slot.stats;
    step.e = e;
    step.out = slot.out;
    step.previous_e = slot.e;
    step.scale = slot.scale;
    step.stream = stream_ && ((uintptr_t)slot.out & 63) == 0;
    step.vocabulary = x_.V;
    step.inv_temperature = (float)slot.inv_temperature;
    step.softcap = x_.softcap;
    job_.kernels_.step(step);
    if (slot.out) write(slot.out, slot.id, x_.dtype, slot.sampled_value);
    slot.out = nullptr;
  }
  void clear(int64_t i, char* grad) {
    const Outputs& o = job_.out_;
    for (float* values : {o.loss, o.logps, o.entropies, o.lse, o.kl, o.coef}) {
      if (values) values[i] = 0.0f;
    }
    for (bool* flags : {o.is_low, o.is_high}) {
      if (flags) flags[i] = false;
    }
    if (grad) memset(grad, 0, row_bytes_);
  }
  // A value of each row in flight; lanes that are left over repeat the first one.
  template <typename Value>
  Floats each(const Value& value) const {
    Floats x{};
    for (int k = 0; k < kLanes; ++k) x[k] = value(k < filled_ ? k : 0);
    return x;
  }
  Floats of(const View<const float>& view) const { return each([&](int k) { return view(slot_[k].b, slot_[k].l); }); }
  template <typename T, typename Lanes>
  void store(T* out, const Lanes& x) const {
    if (!out) return;
    for (int k = 0; k < filled_; ++k) out[slot_[k].b * x_.L + slot_[k].l] = x[k];
  }

  // From the statistics of the rows in flight to their tokens' outputs and the plan of their gradients.
  void settle();
  // The loss of each token and token_weight * dloss/dlogp, which is returned.
  Floats lose(const Objective& f, const Floats& logp);
  // Writes the gradients, or has the next step of each slot write them.
  void plan(const Scores& s, const Floats& coef, float entropy_weight);
  RowStats<double> merge_blocks(const Slot& slot, float* top);
  double inv_temperature(int64_t b, int64_t l) {
    return 1.0 / (x_.temperatures ? (double)x_.temperatures(b, l) : x_.temperature);
  }
  void differentiate(
      const char* z, char* grad, double inv_temperature, int64_t id, float sampled_value, const RowDerivative& d) {
    job_.kernels_.differentiate(z, grad, x_.V, (float)inv_temperature, x_.softcap, d);
    write(grad, id, x_.dtype, sampled_value);
  }

  Job& job_;
  const Logits& x_;
  const int64_t row_bytes_, blocks_;
  const int slots_;
  bool keep_exponentials_, stream_, over_logits_;
  std::unique_ptr<RowStats<float>[], Free> stats_;
  std::unique_ptr<float[], Free> scale_, e_;
  Slot slot_[kLanes];
  int filled_ = 0;
};

// The statistics of the row, of z / temperature, from those of its blocks; `top` becomes the row's maximum. Leaves in
// `scale` what brings each block's exponentials to that maximum: exp((the block's - the row's) / temperature).
inline RowStats<double> Job::Worker::merge_blocks(const Slot& slot, float* top) {
  *top = -INFINITY;
  for (int64_t i = 0; i < blocks_; ++i) *top = slot.stats[i].max > *top ? slot.stats[i].max : *top;
  RowStats<double> row{-INFINITY, 0.0, 0.0};
  for (int64_t i = 0; i < blocks_; ++i) {
    const RowStats<float>& s = slot.stats[i];
    row = merge(row, RowStats<double>{s.max * slot.inv_temperature, s.sum, s.weighted * slot.inv_temperature});
    slot.scale[i] = s.max == *top ? 1.0f : expf((s.max - *top) * (float)slot.inv_temperature);
  }
  return row;
}

inline void Job::Worker::forward(int64_t b, int64_t l) {
  char* grad = x_.grad ? &x_.grad(b, l) : nullptr;
  if (x_.mask && !x_.mask(b, l)) return clear(b * x_.L + l, grad);
  Slot& slot = slot_[filled_];
  const int64_t id = x_.ids(b, l);
  const char* z = &x_.z(b, l);
  const Capped<double> sampled = capped<double>(read(z, id, x_.dtype), x_.softcap);  // before z is overwritten
  float* e = over_logits_ ? (float*)grad : slot.e;
  slot.inv_temperature = inv_temperature(b, l);
  step(slot, z, e);
  slot.e = e;
  slot.b = b;
  slot.l = l;
  slot.id = id;
  slot.z = z;
  slot.sampled = sampled.y * slot.inv_temperature;
  slot.sampled_cap = (float)sampled.slope;
  if (++filled_ == slots_) settle();
}

inline void Job::Worker::settle() {
  if (filled_ == 0) return;
  Scores s{};
  for (int k = 0; k < filled_; ++k) s.rows[k] = merge_blocks(slot_[k], s.top + k);
  s.sum = each([&](int k) { return (float)s.rows[k].sum; });
  const Floats weighted = each([&](int k) { return (float)s.rows[k].weighted; });
  s.log_sum = log_of(s.sum);
  // logp = z_id / temperature - lse, of which the maximum is subtracted in float64, where large logits lose no digits.
  const Floats from_max = each([&](int k) { return (float)(slot_[k].sampled - s.rows[k].max); });
  s.logp = from_max - s.log_sum.most - s.log_sum.rest;
  s.entropy = s.log_sum.most + (s.log_sum.rest - weighted / s.sum);
  store(job_.out_.logps, s.logp);
  store(job_.out_.entropies, s.entropy);
  store(job_.out_.lse, each([&](int k) { return (float)s.rows[k].max; }) + s.log_sum.most + s.log_sum.rest);
  if (job_.objective_) {
    const Floats coef = lose(*job_.objective_, s.logp);
    if (x_.grad) plan(s, coef, job_.objective_->entropy_weight);
  }
  filled_ = 0;
}

inline Floats Job::Worker::lose(const Objective& f, const Floats& logp) {
  TokenInput<Floats> token{};
  token.logp = logp;
  token.has_old = (bool)f.old_logps;
  token.has_ref = (bool)f.ref_logps;
  if (token.has_old) token.old_logp = of(f.old_logps);
  if (token.has_ref) token.ref_logp = of(f.ref_logps);
  token.advantage = of(f.advantages);
  token.is_ratio = f.is_ratio ? of(f.is_ratio) : Floats{} + 1.0f;
  token.beta = of(f.beta);
  token.epsilon_low = f.epsilon_low ? of(f.epsilon_low) : Floats{} + f.spec.numbers.epsilon_low;
  token.epsilon_high = f.epsilon_high ? of(f.epsilon_high) : Floats{} + f.spec.numbers.epsilon_high;
  const TokenLoss<Floats> t = token_loss(token, f.spec);
  const Floats coef = of(f.token_weight) * t.dloss_dlogp;
  const Outputs& o = job_.out_;
  store(o.loss, t.loss);
  store(o.kl, t.kl);
  store(o.is_low, t.low);
  store(o.is_high, t.high);
  store(o.coef, coef);
  return coef;
}

inline void Job::Worker::plan(const Scores& s, const Floats& coef, float entropy_weight) {
  const Floats inv_temperature = each([&](int k) { return (float)slot_[k].inv_temperature; });
  const RowGradient<Floats> g = row_gradient(coef, Floats{} + entropy_weight, s.entropy, inv_temperature);
  const Floats cap = each([&](int k) { return slot_[k].sampled_cap; });
  const Floats sampled_value = sampled_gradient(g, s.logp) * cap, factor = g.base / s.sum;
  for (int k = 0; k < filled_; ++k) {
    Slot& slot = slot_[k];
    char* grad = &x_.grad(slot.b, slot.l);
    if (coef[k] == 0.0f && entropy_weight == 0.0f) {
      memset(grad, 0, row_bytes_);
    } else if (keep_exponentials_) {
      // p_j * base = exp((z_j - max) / temperature) * (base / sum): one multiplication of what pass 1 kept.
      for (int64_t i = 0; i < blocks_; ++i) slot.scale[i] *= factor[k];
      slot.out = grad;
      slot.sampled_value = sampled_value[k];
    } else {
      // With d = (z_j - max) / temperature, p_j = exp(d) / sum and log p_j = d - log(sum):
      // p_j * (base + slope * log p_j) = exp(d) * ((base - slope * log(sum)) / sum + slope / sum * d)
      const double log_of_sum = (double)s.log_sum.most[k] + s.log_sum.rest[k], scale = 1.0 / s.rows[k].sum;
      const double base = (g.base[k] - g.slope[k] * log_of_sum) * scale, slope = g.slope[k] * slot.inv_temperature * scale;
      const RowDerivative derivative = {s.top[k], (float)base, (float)slope};
      differentiate(slot.z, grad, slot.inv_temperature, slot.id, sampled_value[k], derivative);
    }
  }
}

inline void Job::Worker::score_backward(int64_t b, int64_t l) {
  char* grad = &x_.grad(b, l);
  const ScoreGradient& s = *job_.score_;
  const int64_t id = x_.ids(b, l);
  const char* z = &x_.z(b, l);
  if (x_.mask && !x_.mask(b, l)) {
    memset(grad, 0, row_bytes_);
    return;
  }
  const double inverse = inv_temperature(b, l);
  const Capped<double> sampled = capped<double>(read(z, id, x_.dtype), x_.softcap);
  const float lse = s.lse(b, l), logp = (float)(sampled.y * inverse - lse);
  const float coef = logp == -INFINITY ? 0.0f : s.grad_logps(b, l);  // a banned token has no derivative
  const float bonus = s.grad_entropies ? -s.grad_entropies(b, l) : 0.0f;
  if (coef == 0.0f && bonus == 0.0f) {
    memset(grad, 0, row_bytes_);
    return;
  }
  const RowGradient<float> g = row_gradient(coef, bonus, s.entropies(b, l), (float)inverse);
  const RowDerivative derivative = {(float)(lse / inverse), g.base, (float)(g.slope * inverse)};
  differentiate(z, grad, inverse, id, sampled_gradient(g, logp) * (float)sampled.slope, derivative);
}

}  // namespace mr1fast
