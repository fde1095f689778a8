// The CPU loss head without torch: what bindings.cpp fills in, and what it runs. Rows are [b, l] of a [B, L, V] tensor.
#pragma once

#include <stdint.h>

#include <atomic>
#include <memory>

#include "token_loss.h"

namespace mr1fast {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// A [B, L] tensor, perhaps expanded (stride 0); data is null where the argument is None.
template <typename T>
struct View {
  T* data = nullptr;
  int64_t stride_b = 0, stride_l = 0;
  explicit operator bool() const { return data != nullptr; }
  T& operator()(int64_t b, int64_t l) const { return data[b * stride_b + l * stride_l]; }
};

struct Logits {
  int64_t B, L, V;
  DType dtype;
  View<const char> z;  // strides in bytes
  View<char> grad;     // likewise; may be the same memory as z, or null
  View<const int64_t> ids;
  View<const bool> mask;
  double temperature;
  View<const float> temperatures;  // instead, if given
  float softcap;                   // infinite: none
};

struct Objective {
  TokenSpec spec;
  float entropy_weight;
  View<const float> advantages, old_logps, ref_logps, is_ratio, token_weight, beta;
  View<const float> epsilon_low, epsilon_high;  // null: those of the spec
};

// Contiguous [B, L] outputs; null ones are not written.
struct Outputs {
  float *loss = nullptr, *logps = nullptr, *entropies = nullptr, *lse = nullptr, *kl = nullptr, *coef = nullptr;
  bool *is_low = nullptr, *is_high = nullptr;
};

struct ScoreGradient {
  View<const float> lse, entropies, grad_logps, grad_entropies;
};

struct RowKernels;

// "avx512_bf16", "avx512", "avx2" or "portable": the best this machine runs. Environment variable MR1FAST_CPU, read at
// the first call, asks for a lesser one (tests do); a name this machine cannot run is an error.
const char* instruction_set();

// One call's work. Threads each call work() until it returns; rows are handed out in order, and what is computed for a
// row depends on that row alone, so that the result has the same bits whatever the number of threads.
class Job {
 public:
  Job(const Logits& logits, const Outputs& outputs, const Objective* objective, const ScoreGradient* score);
  int64_t threads(int64_t available);  // how many are worth waking; called before work()
  void work();
  // sum token_weight * loss - entropy_weight * sum entropies, after the work; summed in row order.
  float loss() const;

 private:
  class Worker;
  Logits logits_;
  Outputs out_;
  const Objective* objective_;   // null: scoring only
  const ScoreGradient* score_;   // not null: the backward of scoring
  const RowKernels& kernels_;
  int64_t rows_per_turn_ = 1;
  std::atomic<int64_t> next_{0};
};

}  // namespace mr1fast
