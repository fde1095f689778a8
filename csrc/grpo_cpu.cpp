// The loss head on the CPU: one visit of each row of logits. What runs over a row is in row_kernels.h; here is what
// happens between rows: statistics to token, token to gradient, and who works on which row.
#include "grpo_cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <new>

#include "half.h"
#include "row_step.h"

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace mr1fast {

namespace {

// Denormals (a logit 90 below the maximum) would make the arithmetic 7 to 21 times slower, and 2^-127 must be 0.
class FlushDenormals {
 public:
#ifdef __x86_64__
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

float read(const char* row, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ((const float*)row)[i];
    case DType::kBFloat16: return to_float(((const BFloat16*)row)[i]);
    default: return to_float(((const Float16*)row)[i]);
  }
}

void write(char* row, int64_t i, DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat32: return from_float(value, (float*)row + i);
    case DType::kBFloat16: return from_float(value, (BFloat16*)row + i);
    default: return from_float(value, (Float16*)row + i);
  }
}

constexpr int64_t kLongRow = 1 << 18;  // bytes

struct Free {
  void operator()(void* p) const { free(p); }
};

template <typename T>
std::unique_ptr<T[], Free> allocate(int64_t n) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, n * sizeof(T)) != 0) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>((T*)p);
}

}  // namespace

// One thread's work, with one row in flight: its gradient is written during pass 1 of the next row. A row of exponentials
// is kept; pass 2 of a row frees each vector of it just before pass 1 of the next row fills it again. In place, those of
// long float32 rows take the logits' place instead, and the second-level cache holds one row less.
class Job::Worker {
 public:
  explicit Worker(Job& job)
      : job_(job),
        x_(job.logits_),
        row_bytes_(x_.V * (int64_t)element_size(x_.dtype)),
        blocks_((x_.V + kBlock - 1) / kBlock),
        inv_temperature_(1.0 / x_.temperature),
        stats_(allocate<RowStats<float>>(blocks_)),
        scale_(allocate<float>(blocks_)) {
    const bool in_place = x_.z.data == x_.grad.data;
    // An entropy bonus makes the gradient more than a multiple of the exponentials.
    keep_exponentials_ = x_.grad && job.objective_ && job.objective_->entropy_weight == 0.0f;
    // Streaming past the cache saves reading what is overwritten. Short rows would pay for it: the sampled token's
    // value is written afterwards, to a line that is still on its way to memory.
    stream_ = keep_exponentials_ && !in_place && row_bytes_ >= 32768;
    over_logits_ = in_place && x_.dtype == DType::kFloat32 && row_bytes_ > kLongRow;
    if (keep_exponentials_ && !over_logits_) e_ = allocate<float>(blocks_ * kBlock);
    step_.e = e_.get();
    step_.vocabulary = x_.V;
    step_.inv_temperature = (float)inv_temperature_;
    step_.stats = stats_.get();
    step_.scale = scale_.get();
  }

  void forward(int64_t b, int64_t l);
  void score_backward(int64_t b, int64_t l);
  void finish() {  // pass 2 of the last row
    step_.z = nullptr;
    if (step_.out) run();
  }

 private:
  void run() {
    job_.kernels_.step(step_);
    if (step_.out) write((char*)step_.out, sampled_, x_.dtype, sampled_value_);
    step_.out = nullptr;
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
  RowStats<double> merge_blocks(float* top);
  void differentiate(const char* z, char* grad, int64_t id, float sampled_value, const RowDerivative& derivative) {
    job_.kernels_.differentiate(z, grad, x_.V, step_.inv_temperature, derivative);
    write(grad, id, x_.dtype, sampled_value);
  }

  Job& job_;
  const Logits& x_;
  const int64_t row_bytes_, blocks_;
  const double inv_temperature_;
  bool keep_exponentials_, stream_, over_logits_;
  std::unique_ptr<RowStats<float>[], Free> stats_;
  std::unique_ptr<float[], Free> scale_, e_;
  Step step_;
  int64_t sampled_ = 0;  // the token of the row in flight, and its derivative
  float sampled_value_ = 0.0f;
};

// The row's statistics, of z / temperature, and its largest logit; leaves exp((maximum of the block - that of the row)
// / temperature) in scale_.
RowStats<double> Job::Worker::merge_blocks(float* top) {
  *top = -INFINITY;
  for (int64_t i = 0; i < blocks_; ++i) *top = stats_[i].max > *top ? stats_[i].max : *top;
  RowStats<double> row{-INFINITY, 0.0, 0.0};
  for (int64_t i = 0; i < blocks_; ++i) {
    const RowStats<float>& s = stats_[i];
    row = merge(row, RowStats<double>{s.max * inv_temperature_, s.sum, s.weighted * inv_temperature_});
    scale_[i] = s.max == *top ? 1.0f : expf((s.max - *top) * step_.inv_temperature);
  }
  return row;
}

void Job::Worker::forward(int64_t b, int64_t l) {
  const int64_t i = b * x_.L + l;
  char* grad = x_.grad ? &x_.grad(b, l) : nullptr;
  if (x_.mask && !x_.mask(b, l)) return clear(i, grad);
  const char* z = &x_.z(b, l);
  const int64_t id = x_.ids(b, l);
  const double sampled = read(z, id, x_.dtype) * inv_temperature_;  // before z is overwritten
  step_.z = z;
  if (keep_exponentials_ && over_logits_) step_.e = (float*)grad;
  run();
  float top;
  const RowStats<double> row = merge_blocks(&top);
  const double log_sum = log(row.sum);
  const float logp = (float)(sampled - row.max - log_sum);
  const float entropy = (float)(log_sum - row.weighted / row.sum);
  const Outputs& o = job_.out_;
  o.logps[i] = logp;
  o.entropies[i] = entropy;
  if (o.lse) o.lse[i] = (float)(row.max + log_sum);
  if (!job_.objective_) return;

  const Objective& f = *job_.objective_;
  TokenInput token{};
  token.logp = logp;
  token.has_old = (bool)f.old_logps;
  token.has_ref = (bool)f.ref_logps;
  if (token.has_old) token.old_logp = f.old_logps(b, l);
  if (token.has_ref) token.ref_logp = f.ref_logps(b, l);
  token.advantage = f.advantages(b, l);
  token.is_ratio = f.is_ratio ? f.is_ratio(b, l) : 1.0f;
  token.beta = f.beta;
  const TokenLoss t = token_loss(token, f.spec);
  const float coef = f.token_weight(b, l) * t.dloss_dlogp;
  o.loss[i] = t.loss;
  if (o.kl) o.kl[i] = t.kl;
  o.is_low[i] = t.low;
  o.is_high[i] = t.high;
  o.coef[i] = coef;
  if (!grad) return;
  if (coef == 0.0f && f.entropy_weight == 0.0f) {
    memset(grad, 0, row_bytes_);
    return;
  }
  const RowGradient g = row_gradient(coef, f.entropy_weight, entropy, step_.inv_temperature);
  const float sampled_value = sampled_gradient(g, logp);
  if (!keep_exponentials_) {
    return differentiate(z, grad, id, sampled_value, {
        top, (float)((g.base - g.slope * log_sum) / row.sum), (float)(g.slope * inv_temperature_ / row.sum)});
  }
  const float factor = (float)(g.base / row.sum);
  for (int64_t k = 0; k < blocks_; ++k) scale_[k] *= factor;
  step_.out = grad;
  step_.previous_e = step_.e;
  step_.stream = stream_ && ((uintptr_t)grad & 63) == 0;
  sampled_ = id;
  sampled_value_ = sampled_value;
}

void Job::Worker::score_backward(int64_t b, int64_t l) {
  char* grad = &x_.grad(b, l);
  const ScoreGradient& s = *job_.score_;
  const int64_t id = x_.ids(b, l);
  const char* z = &x_.z(b, l);
  if (x_.mask && !x_.mask(b, l)) {
    memset(grad, 0, row_bytes_);
    return;
  }
  const float lse = s.lse(b, l), logp = (float)(read(z, id, x_.dtype) * inv_temperature_ - lse);
  const float coef = logp == -INFINITY ? 0.0f : s.grad_logps(b, l);  // a banned token has no derivative
  const float bonus = s.grad_entropies ? -s.grad_entropies(b, l) : 0.0f;
  if (coef == 0.0f && bonus == 0.0f) {
    memset(grad, 0, row_bytes_);
    return;
  }
  const RowGradient g = row_gradient(coef, bonus, s.entropies(b, l), step_.inv_temperature);
  differentiate(z, grad, id, sampled_gradient(g, logp), {
      (float)(lse * x_.temperature), g.base, (float)(g.slope * inv_temperature_)});
}

Job::Job(const Logits& logits, const Outputs& outputs, const Objective* objective, const ScoreGradient* score)
    : logits_(logits), out_(outputs), objective_(objective), score_(score), kernels_(row_kernels(logits.dtype)) {
}

int64_t Job::threads(int64_t available) {
  // Waking a thread costs as much as this many logits, and much more where the machine is busy.
  constexpr int64_t kLogitsPerThread = 65536;
  const int64_t rows = logits_.B * logits_.L, useful = rows * logits_.V / kLogitsPerThread;
  const int64_t threads = useful < 1 ? 1 : useful < available ? useful : available;
  // A prefetch that runs over the end of a turn takes lines from another thread's rows: turns are as long as balance
  // allows, up to 2 MiB.
  const int64_t longest = (2 << 20) / (logits_.V * (int64_t)element_size(logits_.dtype)), fair = rows / (4 * threads);
  rows_per_turn_ = longest < 1 || fair < 1 ? 1 : longest < fair ? longest : fair;
  return threads;
}

void Job::work() {
  const int64_t rows = logits_.B * logits_.L;
  if (next_.load() >= rows) return;
  const FlushDenormals flush;
  Worker worker(*this);
  for (int64_t first; (first = next_.fetch_add(rows_per_turn_)) < rows;) {
    for (int64_t row = first; row < first + rows_per_turn_ && row < rows; ++row) {
      const int64_t b = row / logits_.L, l = row % logits_.L;
      if (score_) {
        worker.score_backward(b, l);
      } else {
        worker.forward(b, l);
      }
    }
  }
  worker.finish();
}

float Job::loss() const {
  double policy = 0.0, entropy = 0.0;
  for (int64_t b = 0, i = 0; b < logits_.B; ++b) {
    for (int64_t l = 0; l < logits_.L; ++l, ++i) {
      if (logits_.mask && !logits_.mask(b, l)) continue;
      policy += (double)objective_->token_weight(b, l) * out_.loss[i];
      entropy += out_.entropies[i];
    }
  }
  const double bonus = objective_->entropy_weight == 0.0f ? 0.0 : objective_->entropy_weight * entropy;
  return (float)(policy - bonus);
}

}  // namespace mr1fast
