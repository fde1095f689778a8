// The loss head on CUDA, host side: which of the two paths to the same results a call takes, and the launch. The tests
// run both paths on a CPU as well.
#include <stdio.h>

#include "cuda_cluster.cuh"
#include "cuda_two_phase.cuh"

namespace mr1fast {
namespace {

int element_size(const Call& call) { return call.dtype == 0 ? 4 : 2; }

bool aligned(const Call& call) {
  const int64_t width = 16 / element_size(call);
  const auto fits = [&](int64_t stride, int64_t count) { return count <= 1 || stride % width == 0; };
  return ((uintptr_t)call.logits | (uintptr_t)call.grad) % 16 == 0 && call.V % width == 0 &&
         fits(call.logits_stride_b, call.B) && fits(call.logits_stride_l, call.L) && fits(call.grad_stride_b, call.B) &&
         fits(call.grad_stride_l, call.L);
}

int slice_bytes(const Split& split) { return (int)sizeof(ClusterShared) + 16 * split.vectors; }

// The smallest cluster of which a multiprocessor holds three blocks at a time, or else two, or else one. Where there is
// none, parts is 0: the two-phase kernels.
Split choose_split(const Call& call, const Machine& m) {
  const int64_t vectors = call.V * element_size(call) / 16;
  const bool possible = call.grad && !call.two_phase && m.clusters && aligned(call);
  if (!possible || 16 * vectors < kSmallestClusterRow) return {0, 0, 0};
  for (int resident = kResident; resident > 0; --resident) {
    for (int parts = 1; parts <= kMaxParts; parts *= 2) {
      const int64_t each = (vectors + parts - 1) / parts;
      const int64_t chunk = (each + kChunks * kClusterThreads - 1) / (kChunks * kClusterThreads) * kClusterThreads;
      const int64_t bytes = (int64_t)sizeof(ClusterShared) + 16 * each;
      if (bytes <= m.shared_per_block && resident * (bytes + m.shared_reserved) <= m.shared_per_processor) {
        return {parts, (int)each, (int)chunk};
      }
    }
  }
  return {0, 0, 0};
}

int threads_for(const Call& call, int most) {  // four vectors each and no fewer than a warp
  const int64_t wanted = call.V * element_size(call) / 64 / 32 * 32;
  return wanted < 32 ? 32 : wanted < most ? (int)wanted : most;
}

template <typename T, bool kCap>
const char* grpo_forward(const Call& call, const Machine& m, void* stream) {
  const int64_t rows = call.B * call.L;
  if (call.rewards) {
    const char* wrong = launch(advantage_kernel, (call.B + 127) / 128, 0, 128, 0, stream, call);
    if (wrong) return wrong;
  }
  const Split split = choose_split(call, m);
  if (split.parts > 0) {
    return launch(
        cluster_fwd_kernel<T, kCap>, rows * split.parts, split.parts, kClusterThreads, slice_bytes(split), stream, call,
        split);
  }
  const int count = threads_for(call, call.grad ? kRowThreads : kScoreThreads);
  const int bytes = sizeof(RowShared);
  return call.grad ? launch(rows_fwd_kernel<T, true, kCap>, rows, 0, count, bytes, stream, call)
                   : launch(rows_fwd_kernel<T, false, kCap>, rows, 0, count, bytes, stream, call);
}

template <typename T, bool kCap>
const char* score_forward(const Call& call, const Machine&, void* stream) {
  const int count = threads_for(call, kScoreThreads);
  return launch(rows_fwd_kernel<T, false, kCap>, call.B * call.L, 0, count, sizeof(RowShared), stream, call);
}

template <typename T, bool kCap>
const char* score_backward(const Call& call, const Machine&, void* stream) {
  return launch(score_bwd_kernel<T, kCap>, call.B * call.L, 0, threads_for(call, kScoreThreads), 0, stream, call);
}

#define MR1_FOR_CAP(function, T)                                                             \
  return call->softcap == INFINITY ? mr1fast::function<T, false>(*call, m, stream)           \
                                   : mr1fast::function<T, true>(*call, m, stream)
#define MR1_FOR_DTYPE(function)                       \
  Machine m;                                          \
  if (const char* wrong = machine(&m)) return wrong;  \
  if (call->dtype == 0) MR1_FOR_CAP(function, float);     \
  if (call->dtype == 1) MR1_FOR_CAP(function, BFloat16);  \
  MR1_FOR_CAP(function, Float16)

}  // namespace
}  // namespace mr1fast

using namespace mr1fast;

int64_t mr1_sizeof_call() { return sizeof(Mr1RowsCall); }
const char* mr1_grpo_forward(const Mr1RowsCall* call, void* stream) { MR1_FOR_DTYPE(grpo_forward); }
const char* mr1_score_forward(const Mr1RowsCall* call, void* stream) { MR1_FOR_DTYPE(score_forward); }
const char* mr1_score_backward(const Mr1RowsCall* call, void* stream) { MR1_FOR_DTYPE(score_backward); }

const char* mr1_grpo_path(const Mr1RowsCall* call) {
  static thread_local char text[80];
  Machine m;
  if (const char* wrong = machine(&m)) return wrong;
  const Split split = choose_split(*call, m);
  if (split.parts > 0) {
    snprintf(text, sizeof text, "cluster of %d, %d bytes each", split.parts, slice_bytes(split));
  } else {
    snprintf(text, sizeof text, "two-phase, %d threads", threads_for(*call, call->grad ? kRowThreads : kScoreThreads));
  }
  return text;
}
