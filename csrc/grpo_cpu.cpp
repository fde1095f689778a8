// The loss head on the CPU: one visit of each row of logits. What runs over a row is in row_kernels.h, what happens
// between rows in row_worker.h; here is who works on which row.
#include "grpo_cpu.h"

#include "row_worker.h"

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

}  // namespace

Job::Job(const Logits& logits, const Outputs& outputs, const Objective* objective, const ScoreGradient* score)
    : logits_(logits), out_(outputs), objective_(objective), score_(score), kernels_(row_kernels(logits.dtype)) {}

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
    int64_t b = first / logits_.L, l = first % logits_.L;
    for (int64_t row = first; row < first + rows_per_turn_ && row < rows; ++row) {
      if (score_) {
        worker.score_backward(b, l);
      } else {
        worker.forward(b, l);
      }
      if (++l == logits_.L) {
        l = 0;
        ++b;
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
