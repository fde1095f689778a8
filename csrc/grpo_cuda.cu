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

// Four vectors each and no fewer than a warp. Rows with one warp each share a block, as starting one takes time that
// such a row would not hide, and as some devices hold no more than 16 blocks a multiprocessor.
Threads threads_for(const Call& call, int most) {
  const int64_t wanted = call.V * element_size(call) / 64 / 32 * 32;
  if (wanted <= 32) return {32, 8};
  return {wanted < most ? (int)wanted : most, 1};
}

template <typename... Parameters>
const char* launch_rows(void (*kernel)(Parameters...), const Call& call, int most, void* stream) {
  if (call.V > INT32_MAX) return "the vocabulary has more than 2^31 - 1 tokens";
  const Threads threads = threads_for(call, most);
  const int64_t blocks = (call.B * call.L + threads.rows - 1) / threads.rows;
  return launch(kernel, blocks, 0, threads, threads.rows * (int)sizeof(RowShared), stream, call);
}

template <typename T, bool kCap>
const char* grpo_forward(const Call& call, const Machine& m, void* stream) {
  if (call.rewards) {
    const char* wrong = launch(advantage_kernel, (call.B + 127) / 128, 0, Threads{128, 1}, 0, stream, call);
    if (wrong) return wrong;
  }
  const Split split = choose_split(call, m);
  if (split.parts > 0) {
    return launch(
        cluster_fwd_kernel<T, kCap>, call.B * call.L * split.parts, split.parts, Threads{kClusterThreads, 1},
        slice_bytes(split), stream, call, split);
  }
  return call.grad ? launch_rows(rows_fwd_kernel<T, true, kCap>, call, kRowThreads, stream)
                   : launch_rows(rows_fwd_kernel<T, false, kCap>, call, kScoreThreads, stream);
}

template <typename T, bool kCap>
const char* score_forward(const Call& call, const Machine&, void* stream) {
  return launch_rows(rows_fwd_kernel<T, false, kCap>, call, kScoreThreads, stream);
}

template <typename T, bool kCap>
const char* score_backward(const Call& call, const Machine&, void* stream) {
  return launch_rows(score_bwd_kernel<T, kCap>, call, kScoreThreads, stream);
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
    const Threads threads = threads_for(*call, call->grad ? kRowThreads : kScoreThreads);
    snprintf(text, sizeof text, "two-phase, %d threads, rows in a block: %d", threads.of_row, threads.rows);
  }
  return text;
}
