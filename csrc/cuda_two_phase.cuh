// The two-phase kernels: one block visits a row in global memory twice, the second time backwards, so that it begins
// with what is still in the second-level cache. Rows may have any alignment.
#pragma once

#include "cuda_token.cuh"

namespace mr1fast {
namespace {

// A row as scalars up to the first 16-byte boundary, vectors, and the scalars that are left.
struct Layout {
  int64_t head, vectors, scalars;
};

template <typename T>
MR1_DEVICE Layout layout_of(const T* row, const T* other, int64_t V) {
  const int64_t head = (int64_t)((0 - (uintptr_t)row) & 15) / (int64_t)sizeof(T);
  if ((((uintptr_t)row ^ (uintptr_t)other) & 15) || head >= V) return {V, 0, V};
  const int64_t vectors = (V - head) / kWidth<T>;
  return {head, vectors, V - vectors * kWidth<T>};
}
template <typename T>
MR1_DEVICE int64_t scalar_at(const Layout& at, int64_t i) {
  return i < at.head ? i : i + at.vectors * kWidth<T>;
}

template <typename T, bool kOnce, bool kCap>
MR1_DEVICE Levels visit_row(const T* row, const Layout& at, float rate, float softcap) {
  constexpr int kBatch = 4;  // loads in flight per thread
  Levels s = no_levels();
  const T* body = row + at.head;
  const int64_t step = threads();
  int64_t v = thread();
  for (; v + (kBatch - 1) * step < at.vectors; v += kBatch * step) {
    Words words[kBatch];
    MR1_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      const T* p = body + (v + u * step) * kWidth<T>;
      words[u] = kOnce ? read_words_once(p) : read_words(p);
    }
    MR1_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      float x[kWidth<T>];
      unpack(words[u], x, T{});
      visit<kCap>(s, x, rate, softcap);
    }
  }
  for (; v < at.vectors; v += step) {
    float x[kWidth<T>];
    unpack(read_words(body + v * kWidth<T>), x, T{});
    visit<kCap>(s, x, rate, softcap);
  }
  for (int64_t i = thread(); i < at.scalars; i += step) {
    float x[1] = {read_one(row + scalar_at<T>(at, i))};
    visit<kCap>(s, x, rate, softcap);
  }
  return s;
}

// Backwards. The caller has made sure that every thread has read the id's logit, for grad may be row.
template <typename T, bool kCap>
MR1_DEVICE void write_row(
    T* grad, const T* row, const Layout& at, const Plan& plan, int64_t id, float softcap) {
  for (int64_t i = thread(); i < at.scalars; i += threads()) {
    float x[1] = {read_one(row + scalar_at<T>(at, i))};
    differentiate<kCap>(x, plan.d, softcap);
    write_one(grad + scalar_at<T>(at, i), x[0]);
  }
  for (int64_t v = at.vectors - 1 - thread(); v >= 0; v -= threads()) {
    float x[kWidth<T>];
    unpack(read_words_once(row + at.head + v * kWidth<T>), x, T{});
    differentiate<kCap>(x, plan.d, softcap);
    write_words_once(grad + at.head + v * kWidth<T>, pack(x, T{}));
  }
  barrier();
  if (thread() == 0) write_one(grad + id, plan.sampled);
}

template <typename T>
MR1_DEVICE void write_zeros(T* grad, const Layout& at) {
  for (int64_t i = thread(); i < at.scalars; i += threads()) write_one(grad + scalar_at<T>(at, i), 0.0f);
  for (int64_t v = thread(); v < at.vectors; v += threads()) {
    write_words_once(grad + at.head + v * kWidth<T>, Words{{0, 0, 0, 0}});
  }
}

struct RowShared {
  Scratch scratch;
  Plan plan;
};

// The one pass, or scoring where there is no gradient and no token_weight.
template <typename T, bool kGradient, bool kCap>
MR1_KERNEL void MR1_THREADS(kRowThreads, 1) rows_fwd_kernel(const Call call) {
  RowShared& shared = *(RowShared*)shared_memory();
  const Row row = row_of(call, block());
  const T* logits = logits_of<T>(call, row);
  T* grad = kGradient ? grad_of<T>(call, row) : nullptr;
  if (!row.live) {
    if (kGradient) write_zeros(grad, layout_of(grad, grad, call.V));
    if (thread() == 0) clear_outputs(call, row);
    return;
  }
  Token token{};
  if (thread() == 0) token = load_token<kCap>(call, row, logits);
  const Layout at = layout_of<T>(logits, kGradient ? grad : logits, call.V);
  const float rate = rate_of(call, row);
  const Levels s = reduce(visit_row<T, !kGradient, kCap>(logits, at, rate, call.softcap), rate, shared.scratch);
  if (thread() == 0) {
    const float base = base_of(s.max);
    shared.plan = finish(call, row, token, relative(s, base, inv_temperature_of(call, row)), base, true);
  }
  if (!kGradient) return;
  barrier();
  const Plan plan = shared.plan;
  if (plan.zero) {
    write_zeros(grad, at);
  } else {
    write_row<T, kCap>(grad, logits, at, plan, token.id, call.softcap);
  }
}

template <typename T, bool kCap>
MR1_KERNEL void MR1_THREADS(kRowThreads, 1) score_bwd_kernel(const Call call) {
  const Row row = row_of(call, block());
  const T* logits = logits_of<T>(call, row);
  T* grad = grad_of<T>(call, row);
  const float on_logp = row.live ? call.grad_logps[row.at] : 0.0f;
  const float on_entropy = row.live && call.grad_entropies ? -call.grad_entropies[row.at] : 0.0f;
  if (on_logp == 0.0f && on_entropy == 0.0f) return write_zeros(grad, layout_of(grad, grad, call.V));
  const Token token = load_token<kCap>(call, row, logits);
  const float lse = call.lse[row.at], inv_temperature = inv_temperature_of(call, row);
  const float logp = token.x_id.y * inv_temperature - lse;
  const float coef = logp == -INFINITY ? 0.0f : on_logp;  // a banned token has no derivative
  const RowGradient<float> g = row_gradient(coef, on_entropy, call.entropies[row.at], inv_temperature);
  const float row_base = lse / inv_temperature;
  const Plan plan = plan_of(g, token, false, logp, row_base, 0.0f, rate_of(call, row));
  barrier();  // every thread has read the id's logit
  write_row<T, kCap>(grad, logits, layout_of<T>(logits, grad, call.V), plan, token.id, call.softcap);
}

}  // namespace
}  // namespace mr1fast
