// The loss head on the CPU: one visit of each row of logits, for AVX-512, AVX2 or any machine, chosen at run time.
#include "grpo_cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <stdexcept>
#include <string>

#include "half.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // a false alarm inside GCC 12's own avx512fintrin.h
#endif
#include <immintrin.h>
#define MR1_X86 1
#endif

#define MR1_INLINE inline __attribute__((always_inline))

namespace mr1fast {

// What one step of a worker does: pass 2 of the previous row (if out) and pass 1 of this row (if z).
struct Step {
  const void* z = nullptr;
  float* e = nullptr;  // receives exp(z - maximum of its block); null: not kept
  RowStats<float>* stats = nullptr;  // one per block

  void* out = nullptr;
  const float* previous_e = nullptr;  // out = e * scale[block]
  const float* scale = nullptr;
  bool stream = false;
  const void* previous_z = nullptr;  // not null: out is computed from the logits again, with
  RowGradient gradient{0, 0, 0};
  float lse = 0.0f;

  int64_t vocabulary = 0;
  float inv_temperature = 1.0f;
};

namespace {

constexpr int64_t kBlock = 4096;  // logits; a block and its exponentials stay in the first-level cache
constexpr int kPrefetchBytes = 8192;
constexpr float kRoundMagic = 0x1.8p23f;  // x + magic has the integer nearest to x in its low bits

inline void set_negative_infinity(float* x) { *x = -INFINITY; }
inline void set_negative_infinity(BFloat16* x) { x->bits = 0xff80; }
inline void set_negative_infinity(Float16* x) { x->bits = 0xfc00; }

namespace portable {
#include "simd_portable.h"

#include "row_kernels.h"
}  // namespace portable

#ifdef MR1_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "simd_avx2.h"

#include "row_kernels.h"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace avx512 {
#include "simd_avx512.h"

#include "row_kernels.h"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // MR1_X86

const RowKernels& row_kernels(const char* name) {
#ifdef MR1_X86
  if (strcmp(name, "avx512") == 0) return avx512::kRowKernels;
  if (strcmp(name, "avx2") == 0) return avx2::kRowKernels;
#endif
  return portable::kRowKernels;
}

const char* choose_instruction_set() {
  const char* asked = getenv("MR1FAST_CPU");
  const std::string wanted = asked ? asked : "";
#ifdef MR1_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return "avx512";
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return "avx2";
#endif
  if (wanted.empty() || wanted == "portable") return "portable";
  throw std::invalid_argument("MR1FAST_CPU must be avx512, avx2 or portable, and this machine must have it; got " + wanted);
}

// Denormals (a logit 90 below the maximum) would make the arithmetic 7 to 21 times slower, and 2^-127 must be 0.
class FlushDenormals {
 public:
#ifdef MR1_X86
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

const char* instruction_set() {
  static const char* chosen = choose_instruction_set();
  return chosen;
}

// A thread's memory: the blocks' statistics and, unless they may stand in the gradient's own memory, one row of
// exponentials. Pass 2 of a row frees each block of it just before pass 1 of the next row fills it again.
class Job::Worker {
 public:
  explicit Worker(Job& job)
      : job_(job),
        x_(job.logits_),
        row_bytes_(x_.V * (int64_t)element_size(x_.dtype)),
        blocks_((x_.V + kBlock - 1) / kBlock),
        stats_(allocate<RowStats<float>>(blocks_)),
        scale_(allocate<float>(blocks_)) {
    const bool in_place = x_.z.data == x_.grad.data;
    keep_exponentials_ = x_.grad && job.objective_ && job.objective_->entropy_weight == 0.0f;
    // Streaming past the cache saves reading what is overwritten. Short rows would pay for it: the sampled token's value
    // is written afterwards, to a line that is still on its way to memory.
    stream_ = keep_exponentials_ && !in_place && row_bytes_ >= 32768;
    own_row_ = keep_exponentials_ && (x_.dtype != DType::kFloat32 || stream_);
    if (own_row_) e_ = allocate<float>(x_.V);
    step_.vocabulary = x_.V;
    step_.inv_temperature = (float)(1.0 / x_.temperature);
  }

  void forward(int64_t b, int64_t l);
  void score_backward(int64_t b, int64_t l);
  void finish() {  // pass 2 of the last row
    step_.z = nullptr;
    if (step_.out) run();
  }

 private:
  void run() {
    job_.kernel_(step_);
    if (step_.out && sampled_ >= 0) write((char*)step_.out, sampled_, x_.dtype, sampled_value_);
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
  RowStats<double> merge_blocks();
  void schedule(char* grad, const RowGradient& gradient, int64_t id, float logp);

  Job& job_;
  const Logits& x_;
  const int64_t row_bytes_, blocks_;
  bool keep_exponentials_, stream_, own_row_;
  std::unique_ptr<RowStats<float>[], Free> stats_;
  std::unique_ptr<float[], Free> scale_, e_;
  Step step_;
  int64_t sampled_ = -1;
  float sampled_value_ = 0.0f;
};

// The row's statistics; leaves exp(maximum of the block - maximum of the row) in scale_.
RowStats<double> Job::Worker::merge_blocks() {
  float top = -INFINITY;
  for (int64_t i = 0; i < blocks_; ++i) top = stats_[i].max > top ? stats_[i].max : top;
  RowStats<double> row{-INFINITY, 0.0, 0.0};
  for (int64_t i = 0; i < blocks_; ++i) {
    const RowStats<float>& s = stats_[i];
    row = merge(row, RowStats<double>{s.max / x_.temperature, s.sum, s.weighted});
    scale_[i] = s.max == top ? 1.0f : expf((s.max - top) * step_.inv_temperature);
  }
  return row;
}

void Job::Worker::schedule(char* grad, const RowGradient& gradient, int64_t id, float logp) {
  step_.out = grad;
  step_.gradient = gradient;
  sampled_ = gradient.hit == 0.0f && gradient.slope == 0.0f ? -1 : id;
  sampled_value_ = sampled_gradient(gradient, logp);
}

void Job::Worker::forward(int64_t b, int64_t l) {
  const int64_t i = b * x_.L + l;
  char* grad = x_.grad ? &x_.grad(b, l) : nullptr;
  if (x_.mask && !x_.mask(b, l)) return clear(i, grad);
  const char* z = &x_.z(b, l);
  const int64_t id = x_.ids(b, l);
  const double sampled = read(z, id, x_.dtype) / x_.temperature;  // before z is overwritten

  step_.z = z;
  step_.e = !keep_exponentials_ ? nullptr : own_row_ ? e_.get() : (float*)grad;
  step_.stats = stats_.get();
  run();
  const RowStats<double> row = merge_blocks();
  const double lse = row_lse(row);
  const float logp = (float)(sampled - lse), entropy = (float)row_entropy(row);
  const Outputs& o = job_.out_;
  o.logps[i] = logp;
  o.entropies[i] = entropy;
  if (o.lse) o.lse[i] = (float)lse;
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
  const RowGradient gradient = row_gradient(coef, f.entropy_weight, entropy, step_.inv_temperature);
  schedule(grad, gradient, id, logp);
  if (keep_exponentials_) {
    const float factor = (float)(gradient.base / row.sum);
    for (int64_t k = 0; k < blocks_; ++k) scale_[k] *= factor;
    step_.scale = scale_.get();
    step_.previous_e = step_.e;
    step_.stream = stream_ && ((uintptr_t)grad & 63) == 0;
  } else {
    step_.previous_z = z;
    step_.lse = (float)lse;
  }
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
  const float lse = s.lse(b, l), logp = (float)(read(z, id, x_.dtype) / x_.temperature - lse);
  const float coef = logp == -INFINITY ? 0.0f : s.grad_logps(b, l);  // a banned token has no derivative
  const float bonus = s.grad_entropies ? -s.grad_entropies(b, l) : 0.0f;
  if (coef == 0.0f && bonus == 0.0f) {
    memset(grad, 0, row_bytes_);
    return;
  }
  schedule(grad, row_gradient(coef, bonus, s.entropies(b, l), step_.inv_temperature), id, logp);
  step_.previous_z = z;
  step_.lse = lse;
  run();
}

Job::Job(const Logits& logits, const Outputs& outputs, const Objective* objective, const ScoreGradient* score)
    : logits_(logits), out_(outputs), objective_(objective), score_(score) {
  const RowKernels& kernels = row_kernels(instruction_set());
  kernel_ = logits.dtype == DType::kFloat32    ? kernels.float32
            : logits.dtype == DType::kBFloat16 ? kernels.bfloat16
                                               : kernels.float16;
  const int64_t row_bytes = logits.V * (int64_t)element_size(logits.dtype);
  rows_per_turn_ = row_bytes < 131072 ? 131072 / row_bytes : 1;
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
