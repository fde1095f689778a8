// The two-phase kernels: one block visits a row in global memory twice, the second time backwards, so that it begins
// with what is still in the second-level cache. Rows may have any alignment. Of rows so short that each has but one warp,
// a block takes several.
#pragma once

#include "cuda_token.cuh"

namespace mr1fast {
namespace {

// A row as scalars up to the first 16-byte boundary, vectors, and the scalars that are left. In 32 bits, as everything
// within a row: pairs of registers would be too many.
struct Layout {
  int head, vectors, scalars;
};

template <typename T>
MR1_DEVICE Layout layout_of(const T* row, const T* other, int V) {
  const int head = (int)((0 - (uintptr_t)row) & 15) / (int)sizeof(T);
  if ((((uintptr_t)row ^ (uintptr_t)other) & 15) || head >= V) return {V, 0, V};
  const int vectors = (V - head) / kWidth<T>;
  return {head, vectors, V - vectors * kWidth<T>};
}
template <typename T>
MR1_DEVICE int scalar_at(const Layout& at, int i) {
  return i < at.head ? i : i + at.vectors * kWidth<T>;
}

constexpr int kBatch = 4;  // loads in flight per thread

template <typename T, bool kOnce, bool kCap>
MR1_DEVICE Levels visit_row(const T* row, const Layout& at, float rate, float softcap) {
  Levels s = no_levels();
  const T* body = row + at.head;
  const int step = threads();
  int v = thread();
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
  for (int i = thread(); i < at.scalars; i += step) {
    float x[1] = {read_one(row + scalar_at<T>(at, i))};
    visit<kCap>(s, x, rate, softcap);
  }
  return s;
}

// Backwards.
template <typename T, bool kCap, bool kBonus>
MR1_DEVICE void write_logits(T* grad, const T* row, const Layout& at, const Plan& plan, float softcap) {
  constexpr int kAtOnce = kCap ? kBatch / 2 : kBatch;  // the cap needs more registers
  for (int i = thread(); i < at.scalars; i += threads()) {
    float x[1] = {read_one(row + scalar_at<T>(at, i))};
    differentiate<kCap, kBonus>(x, plan.d, softcap);
    write_one(grad + scalar_at<T>(at, i), x[0]);
  }
  const T* body = row + at.head;
  T* to = grad + at.head;
  const int step = threads();
  int v = at.vectors - 1 - thread();
  for (; v - (kAtOnce - 1) * step >= 0; v -= kAtOnce * step) {
    Words words[kAtOnce];
    MR1_UNROLL
    for (int u = 0; u < kAtOnce; ++u) words[u] = read_words_once(body + (v - u * step) * kWidth<T>);
    MR1_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      write_words_once(to + (v - u * step) * kWidth<T>, gradient_of<T, kCap, kBonus>(words[u], plan, softcap));
    }
  }
  for (; v >= 0; v -= step) {
    const Words logits = read_words_once(body + v * kWidth<T>);
    write_words_once(to + v * kWidth<T>, gradient_of<T, kCap, kBonus>(logits, plan, softcap));
  }
}

// Of the threads of a row.
MR1_DEVICE void row_barrier() { rows_in_block() > 1 ? warp_barrier() : barrier(); }

// The caller has made sure that every thread has read the id's logit, for grad may be row.
template <typename T, bool kCap>
MR1_DEVICE void write_row(T* grad, const T* row, const Layout& at, const Plan& plan, int64_t id, float softcap) {
  if (plan.d.slope == 0.0f) {
    write_logits<T, kCap, false>(grad, row, at, plan, softcap);
  } else {
    write_logits<T, kCap, true>(grad, row, at, plan, softcap);
  }
  row_barrier();
  if (thread() == 0) write_one(grad + id, plan.sampled);
}

template <typename T>
MR1_DEVICE void write_zeros(T* grad, const Layout& at) {
  for (int i = thread(); i < at.scalars; i += threads()) write_one(grad + scalar_at<T>(at, i), 0.0f);
  for (int v = thread(); v < at.vectors; v += threads()) {
    write_words_once(grad + at.head + v * kWidth<T>, Words{{0, 0, 0, 0}});
  }
}

MR1_DEVICE int64_t row_index() { return block() * rows_in_block() + row_in_block(); }

struct RowShared {
  Token token;
  Levels of_warps[kMaxWarps];
  Plan plan;
};

// The one pass, or scoring where there is no gradient and no token_weight.
template <typename T, bool kGradient, bool kCap>
MR1_KERNEL void MR1_THREADS(kRowThreads, 1) rows_fwd_kernel(const Call call) {
  if (row_index() >= call.B * call.L) return;
  RowShared& shared = ((RowShared*)shared_memory())[row_in_block()];
  const Row row = row_of(call, row_index());
  const T* logits = logits_of<T>(call, row);
  T* grad = kGradient ? grad_of<T>(call, row) : nullptr;
  if (!row.live) {
    if (kGradient) write_zeros(grad, layout_of(grad, grad, (int)call.V));
    if (thread() == 0) clear_outputs(call, row);
    return;
  }
  if (thread() == 0) shared.token = load_token<kCap>(call, row, logits);
  const Layout at = layout_of<T>(logits, kGradient ? grad : logits, (int)call.V);
  const float rate = rate_of(call, row);
  const Levels mine = visit_row<T, !kGradient, kCap>(logits, at, rate, call.softcap);
  const Levels s = threads() == 32 ? reduce_warp(mine, rate) : reduce(mine, rate, shared.of_warps);
  if (thread() == 0) shared.plan = finish(call, row, shared.token, s, true);
  if (!kGradient) return;
  row_barrier();
  const Plan plan = shared.plan;
  if (plan.zero) {
    write_zeros(grad, at);
  } else {
    write_row<T, kCap>(grad, logits, at, plan, shared.token.id, call.softcap);
  }
}

template <typename T, bool kCap>
MR1_KERNEL void MR1_THREADS(kRowThreads, 1) score_bwd_kernel(const Call call) {
  if (row_index() >= call.B * call.L) return;
  const Row row = row_of(call, row_index());
  const T* logits = logits_of<T>(call, row);
  T* grad = grad_of<T>(call, row);
  const float on_logp = row.live ? call.grad_logps[row.at] : 0.0f;
  const float on_entropy = row.live && call.grad_entropies ? -call.grad_entropies[row.at] : 0.0f;
  if (on_logp == 0.0f && on_entropy == 0.0f) return write_zeros(grad, layout_of(grad, grad, (int)call.V));
  const Token token = load_token<kCap>(call, row, logits);
  const float inv_temperature = inv_temperature_of(call, row), lse = call.lse[row.at];
  const float logp = token.x_id.y * inv_temperature - lse;
  const float coef = logp == -INFINITY ? 0.0f : on_logp;  // a banned token has no derivative
  const RowGradient<float> g = row_gradient(coef, on_entropy, call.entropies[row.at], inv_temperature);
  const float level = lse * kLog2E, rest = fmaf(lse, kLog2ERest, fmaf(lse, kLog2E, -level));
  const Plan plan = plan_of(g, token, false, logp, rate_of(call, row), level, rest);
  row_barrier();  // every thread has read the id's logit
  write_row<T, kCap>(grad, logits, layout_of<T>(logits, grad, (int)call.V), plan, token.id, call.softcap);
}

}  // namespace
}  // namespace mr1fast
