// The CPU kernel without Python and torch, in one thread and in many, whose results must have the same bits. It is for
// sanitizers (`make sanitize`): ThreadSanitizer cannot see how OpenMP's threads wait for each other, and std::thread's it
// can. Prints what differs; the exit code is then 1.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <thread>
#include <vector>

#include "grpo_cpu.h"

namespace {

using namespace mr1fast;

constexpr int kThreads = 4, kRounds = 5;

struct Result {
  std::vector<float> floats;  // logps, entropies, kl, loss per token, gradient and loss, or log-sum-exp and gradient
  std::vector<char> bytes;

  bool operator==(const Result& other) const {
    return floats.size() == other.floats.size() && bytes == other.bytes &&
           memcmp(floats.data(), other.floats.data(), floats.size() * sizeof(float)) == 0;
  }
};

struct Inputs {
  int64_t B, L, V;
  DType dtype;
  std::vector<char> logits;
  std::vector<int64_t> ids;
  std::vector<char> mask;
  std::vector<float> advantages, old_logps, ref_logps, weight, beta;

  Inputs(int64_t B, int64_t L, int64_t V, DType dtype) : B(B), L(L), V(V), dtype(dtype) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, 2);
    for (int64_t i = 0; i < B * L * V; ++i) {
      const float value = normal(random);
      uint32_t bits;
      memcpy(&bits, &value, 4);
      const uint16_t upper = bits >> 16;  // bfloat16
      const char* from = dtype == DType::kFloat32 ? (const char*)&bits : (const char*)&upper;
      logits.insert(logits.end(), from, from + size());
    }
    for (int64_t i = 0; i < B * L; ++i) {
      mask.push_back(random() % 4 != 0);
      ids.push_back(mask.back() ? random() % V : -100);
      for (auto* each : {&advantages, &old_logps, &ref_logps}) each->push_back(-fabsf(normal(random)));
      weight.push_back(1.0f / (B * L));
      beta.push_back(0.1f);
    }
  }

  int64_t size() const { return dtype == DType::kFloat32 ? 4 : 2; }

  template <typename T, typename From>
  View<T> view(From& from) const {
    return {(T*)from.data(), L, 1};
  }

  Logits describe(char* z, char* grad) {
    Logits x{};
    x.B = B, x.L = L, x.V = V, x.dtype = dtype, x.temperature = 0.9, x.softcap = INFINITY;
    x.z = {z, L * V * size(), V * size()};
    if (grad != nullptr) x.grad = {grad, L * V * size(), V * size()};
    x.ids = view<const int64_t>(ids);
    x.mask = view<const bool>(mask);
    return x;
  }
};

void run(Job& job, int threads) {
  if (threads == 1) return job.threads(1), job.work();
  std::vector<std::thread> all;
  job.threads(threads);
  for (int i = 0; i < threads; ++i) all.emplace_back([&] { job.work(); });
  for (std::thread& one : all) one.join();
}

// The one pass, which writes the gradient over the logits.
Result loss_and_gradient(Inputs& in, int threads) {
  const int64_t n = in.B * in.L;
  Result result{std::vector<float>(5 * n + 1), in.logits};
  std::vector<char> flags(2 * n);
  float* floats = result.floats.data();
  Outputs out;
  out.logps = floats, out.entropies = floats + n, out.kl = floats + 2 * n, out.loss = floats + 3 * n;
  out.coef = floats + 4 * n, out.is_low = (bool*)flags.data(), out.is_high = (bool*)flags.data() + n;
  Objective objective{};
  objective.spec = {{Policy::kClip, Estimator::kK3, 0}, {0.2f, 0.2f, INFINITY, INFINITY, 1.0f, 1.05f, INFINITY}};
  objective.entropy_weight = 0.01f;
  objective.advantages = in.view<const float>(in.advantages);
  objective.old_logps = in.view<const float>(in.old_logps);
  objective.ref_logps = in.view<const float>(in.ref_logps);
  objective.token_weight = in.view<const float>(in.weight);
  objective.beta = in.view<const float>(in.beta);
  Job job(in.describe(result.bytes.data(), result.bytes.data()), out, &objective, nullptr);
  run(job, threads);
  floats[5 * n] = job.loss();
  result.bytes.insert(result.bytes.end(), flags.begin(), flags.end());
  return result;
}

// Scoring, and its backward into a tensor of its own.
Result scores_and_gradient(Inputs& in, int threads) {
  const int64_t n = in.B * in.L;
  Result result{std::vector<float>(3 * n), std::vector<char>(in.logits.size())};
  float* floats = result.floats.data();
  Outputs out;
  out.logps = floats, out.entropies = floats + n, out.lse = floats + 2 * n;
  Job forward(in.describe(in.logits.data(), nullptr), out, nullptr, nullptr);
  run(forward, threads);
  ScoreGradient score{};
  score.lse = {floats + 2 * n, in.L, 1}, score.entropies = {floats + n, in.L, 1};
  score.grad_logps = in.view<const float>(in.advantages), score.grad_entropies = in.view<const float>(in.weight);
  Job backward(in.describe(in.logits.data(), result.bytes.data()), Outputs{}, nullptr, &score);
  run(backward, threads);
  return result;
}

}  // namespace

int main() {
  int wrong = 0;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t V : {1, 7, 64, 1000, 20'001}) {
      Inputs in(3, 11, V, dtype);
      for (auto* function : {loss_and_gradient, scores_and_gradient}) {
        const Result one = function(in, 1);
        for (int round = 0; round < kRounds; ++round) {
          if (function(in, kThreads) == one) continue;
          printf("V = %d: %d threads give another result than one\n", (int)V, kThreads);
          wrong = 1;
        }
      }
    }
  }
  printf("%s: %s\n", instruction_set(), wrong ? "failed" : "the same bits in one thread and in many");
  return wrong;
}
