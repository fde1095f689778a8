// The loss head on CUDA. Two paths to the same results:
//
// - cluster: the blocks of a thread-block cluster hold a row in their shared memory together. Logits are read once and
//   the gradient is written once, by bulk copies; the blocks exchange three numbers each. Compute capability 9.0,
//   16-byte aligned rows.
// - two-phase: one block visits a row in global memory twice, the second time backwards, so that it begins with what is
//   still in the second-level cache. Any alignment.
//
// The objective is token_loss.h's, the arithmetic of a row split_row.h's; tests run both kernels on a CPU, too.
#ifdef MR1_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include "cuda_primitives.h"
#endif

#include <stdio.h>

#include "grpo_cuda.h"
#include "split_row.h"

namespace mr1fast {
namespace {

using Call = Mr1RowsCall;
constexpr int kMaxParts = 8;   // the largest cluster that every device of capability 9.0 takes
constexpr int kChunks = 4;     // bulk copies per block: work begins when the first has arrived
constexpr int kResident = 3;   // blocks per multiprocessor: while one loads, another computes and a third stores

template <typename T>
constexpr int kWidth = 16 / (int)sizeof(T);

// ---- one row --------------------------------------------------------------------------------------------------------

struct Row {
  int64_t b, l, at;
  bool live;  // not masked
};

MR1_DEVICE Row row_of(const Call& call, int64_t index) {
  Row row;
  row.b = index / call.L;
  row.l = index - row.b * call.L;
  row.at = index;
  row.live = !call.mask || call.mask[index];
  return row;
}

template <typename T>
MR1_DEVICE const T* logits_of(const Call& call, const Row& row) {
  return (const T*)call.logits + row.b * call.logits_stride_b + row.l * call.logits_stride_l;
}
template <typename T>
MR1_DEVICE T* grad_of(const Call& call, const Row& row) {
  return (T*)call.grad + row.b * call.grad_stride_b + row.l * call.grad_stride_l;
}

MR1_DEVICE float levels_of(const Call& call) { return (float)(1.44269504088896341 / call.temperature); }
MR1_DEVICE float inv_temperature_of(const Call& call) { return (float)(1.0 / call.temperature); }

struct Scratch {
  float max[32], sum[32], weighted[32];  // one per warp
};

MR1_DEVICE float warp_max(float x) {
  MR1_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = max_or_nan(x, from_lane(x, mask));
  return x;
}
MR1_DEVICE float warp_sum(float x) {
  MR1_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += from_lane(x, mask);
  return x;
}

// Every thread's statistics in one, the same for all threads of the block.
MR1_DEVICE Levels reduce(Levels s, float levels, Scratch& scratch) {
  const int warp = thread() / 32, lane = thread() % 32, warps = threads() / 32;
  float top = warp_max(s.max);
  if (lane == 0) scratch.max[warp] = top;
  barrier();
  top = warp_max(lane < warps ? scratch.max[lane] : -INFINITY);
  s = rebased(s, top, levels);
  s.sum = warp_sum(s.sum);
  s.weighted = warp_sum(s.weighted);
  if (lane == 0) {
    scratch.sum[warp] = s.sum;
    scratch.weighted[warp] = s.weighted;
  }
  barrier();
  return {top, warp_sum(lane < warps ? scratch.sum[lane] : 0.0f), warp_sum(lane < warps ? scratch.weighted[lane] : 0.0f)};
}

// ---- one token, by one thread ---------------------------------------------------------------------------------------

struct Token {
  int64_t id;
  float x_id, weight, entropy_weight;
  TokenInput in;
};

// Everything small, before the row: its latency hides behind the row's, and in place the id's logit is soon gone.
template <typename T>
MR1_DEVICE Token load_token(const Call& call, const Row& row, const T* logits) {
  Token t{};
  t.id = call.ids[row.at];
  require(t.id >= 0 && t.id < call.V);
  t.x_id = read_one(logits + t.id);
  if (!call.token_weight) return t;  // scoring
  t.weight = call.token_weight[row.b * call.weight_stride_b + row.l * call.weight_stride_l];
  t.entropy_weight = call.entropy_weight ? *call.entropy_weight : 0.0f;
  t.in.has_old = call.old_logps;
  t.in.has_ref = call.ref_logps;
  if (call.old_logps) t.in.old_logp = call.old_logps[row.at];
  if (call.ref_logps) t.in.ref_logp = call.ref_logps[row.at];
  t.in.advantage = call.advantages ? call.advantages[row.b * call.advantage_stride_b + row.l * call.advantage_stride_l]
                                   : call.advantage_space[row.b];
  t.in.is_ratio = call.is_ratio ? call.is_ratio[row.b * call.is_ratio_stride_b + row.l * call.is_ratio_stride_l] : 1.0f;
  t.in.beta = *call.beta;
  return t;
}

// How a row's logits become its gradient.
struct Plan {
  Differentiation d;
  float sampled;  // the gradient at the id, which stands
  int64_t id_vector;  // in this 16-byte vector of the block's part of the row (cluster only), or in another block's
  int id_lane;
  bool zero;
};

MR1_DEVICE Plan plan_of(const RowGradient& g, bool zero, float logp, float row_base, float log_sum, float levels) {
  return {differentiation(g, row_base, log_sum, levels), sampled_gradient(g, logp), 0, 0, zero};
}

// From the row's statistics (relative to row_base, its maximum) to the token's outputs, which are stored, and the row's gradient.
MR1_DEVICE Plan finish(
    const Call& call, const Row& row, const Token& t, const RowStats<float>& s, float row_base, bool store) {
  const float inv_temperature = inv_temperature_of(call), levels = levels_of(call);
  const float log_sum = logf(s.sum), entropy = log_sum - s.weighted / s.sum;  // the maximum is 0
  const float logp = (t.x_id - row_base) * inv_temperature - log_sum;
  if (store) {
    call.logps[row.at] = logp;
    call.entropies[row.at] = entropy;
    if (call.lse) call.lse[row.at] = row_base * inv_temperature + log_sum;
  }
  if (!call.token_weight) return {};
  TokenSpec spec;
  spec.policy = (Policy)call.policy;
  spec.epsilon_low = call.epsilon_low;
  spec.epsilon_high = call.epsilon_high;
  spec.delta = call.delta;
  spec.bias_correction = call.bias_correction;
  spec.sapo_temperature_pos = call.sapo_temperature_pos;
  spec.sapo_temperature_neg = call.sapo_temperature_neg;
  TokenInput in = t.in;
  in.logp = logp;
  const TokenLoss loss = token_loss(in, spec);
  const float coef = t.weight * loss.dloss_dlogp;
  if (store) {
    call.share[row.at] = t.weight * loss.loss - (t.entropy_weight == 0.0f ? 0.0f : t.entropy_weight * entropy);
    call.loss[row.at] = loss.loss;
    if (call.kl) call.kl[row.at] = loss.kl;
    call.coef[row.at] = coef;
    call.is_low[row.at] = loss.low;
    call.is_high[row.at] = loss.high;
  }
  const RowGradient g = row_gradient(coef, t.entropy_weight, entropy, inv_temperature);
  return plan_of(g, coef == 0.0f && t.entropy_weight == 0.0f, logp, row_base, log_sum, levels);
}

MR1_DEVICE void clear_outputs(const Call& call, const Row& row) {
  float* const values[] = {call.share, call.loss, call.logps, call.entropies, call.kl, call.coef, call.lse};
  for (float* p : values) {
    if (p) p[row.at] = 0.0f;
  }
  if (call.is_low) call.is_low[row.at] = call.is_high[row.at] = false;
}

// rewards [B] -> advantages [B]. Rewards are few: a thread runs through its own group.
MR1_KERNEL void advantage_kernel(const Call call) {
  const int64_t b = block() * threads() + thread();
  if (b >= call.B) return;
  const int64_t G = call.num_generations, first = b / G * G;
  Moments m = reward_moments(call.rewards + first, G);
  const double mean = m.mean;
  if (call.scale_rewards == 2) m = reward_moments(call.rewards, call.B);
  call.advantage_space[b] = group_advantage(call.rewards[b], mean, call.scale_rewards != 0, m.std);
}

// ---- two-phase: a row in global memory ------------------------------------------------------------------------------

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

template <typename T, bool kOnce>
MR1_DEVICE Levels visit_row(const T* row, const Layout& at, float levels) {
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
      visit(s, x, levels);
    }
  }
  for (; v < at.vectors; v += step) {
    float x[kWidth<T>];
    unpack(read_words(body + v * kWidth<T>), x, T{});
    visit(s, x, levels);
  }
  for (int64_t i = thread(); i < at.scalars; i += step) {
    const float x[1] = {read_one(row + scalar_at<T>(at, i))};
    visit(s, x, levels);
  }
  return s;
}

// Backwards. The caller has made sure that every thread has read the id's logit, for grad may be row.
template <typename T>
MR1_DEVICE void write_row(T* grad, const T* row, const Layout& at, const Plan& plan, int64_t id) {
  for (int64_t i = thread(); i < at.scalars; i += threads()) {
    float x[1] = {read_one(row + scalar_at<T>(at, i))};
    differentiate(x, plan.d);
    write_one(grad + scalar_at<T>(at, i), x[0]);
  }
  for (int64_t v = at.vectors - 1 - thread(); v >= 0; v -= threads()) {
    float x[kWidth<T>];
    unpack(read_words_once(row + at.head + v * kWidth<T>), x, T{});
    differentiate(x, plan.d);
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
template <typename T, bool kGradient>
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
  if (thread() == 0) token = load_token(call, row, logits);
  const Layout at = layout_of<T>(logits, kGradient ? grad : logits, call.V);
  const float levels = levels_of(call);
  const Levels s = reduce(visit_row<T, !kGradient>(logits, at, levels), levels, shared.scratch);
  if (thread() == 0) {
    const float base = base_of(s.max);
    shared.plan = finish(call, row, token, relative(s, base, inv_temperature_of(call)), base, true);
  }
  if (!kGradient) return;
  barrier();
  const Plan plan = shared.plan;
  if (plan.zero) {
    write_zeros(grad, at);
  } else {
    write_row(grad, logits, at, plan, token.id);
  }
}

template <typename T>
MR1_KERNEL void MR1_THREADS(kRowThreads, 1) score_bwd_kernel(const Call call) {
  const Row row = row_of(call, block());
  const T* logits = logits_of<T>(call, row);
  T* grad = grad_of<T>(call, row);
  const float on_logp = row.live ? call.grad_logps[row.at] : 0.0f;
  const float on_entropy = row.live && call.grad_entropies ? -call.grad_entropies[row.at] : 0.0f;
  if (on_logp == 0.0f && on_entropy == 0.0f) return write_zeros(grad, layout_of(grad, grad, call.V));
  const Token token = load_token(call, row, logits);
  const float lse = call.lse[row.at], inv_temperature = inv_temperature_of(call);
  const float logp = token.x_id * inv_temperature - lse;
  const float coef = logp == -INFINITY ? 0.0f : on_logp;  // a banned token has no derivative
  const RowGradient g = row_gradient(coef, on_entropy, call.entropies[row.at], inv_temperature);
  const float row_base = lse * (float)call.temperature;
  const Plan plan = plan_of(g, false, logp, row_base, 0.0f, levels_of(call));
  barrier();  // every thread has read the id's logit
  write_row(grad, logits, layout_of<T>(logits, grad, call.V), plan, token.id);
}

// ---- cluster: a row in the shared memory of several blocks ----------------------------------------------------------

// How a cluster holds a row: `parts` blocks of `vectors` 16-byte vectors each (the last one less), `chunk` to a copy.
struct Split {
  int parts, vectors, chunk;
};

struct alignas(128) ClusterShared {
  Arrival arrived[kChunks];
  Levels parts[kMaxParts];
  float x_id;
  Plan plan;
  Scratch scratch;
};

template <typename T>
MR1_KERNEL void MR1_THREADS(kClusterThreads, kResident) cluster_fwd_kernel(const Call call, const Split split) {
#if MR1_HAS_CLUSTERS
  ClusterShared& shared = *(ClusterShared*)shared_memory();
  Words* slice = (Words*)(shared_memory() + sizeof(ClusterShared));
  const int rank = cluster_rank();
  const Row row = row_of(call, block() / split.parts);
  const T* logits = logits_of<T>(call, row);
  const int64_t first = (int64_t)rank * split.vectors, vectors = call.V / kWidth<T>;  // of the row
  const int count = first >= vectors ? 0 : vectors - first < split.vectors ? (int)(vectors - first) : split.vectors;
  Words* grad = (Words*)grad_of<T>(call, row) + first;
  if (!row.live) {
    for (int v = thread(); v < count; v += threads()) write_words_once(grad + v, Words{{0, 0, 0, 0}});
    if (rank == 0 && thread() == 0) clear_outputs(call, row);
    return;
  }

  const uint64_t policy = evict_first();
  Token token{};
  if (thread() == 0) {
    for (int c = 0; c < kChunks; ++c) expect_nothing_yet(&shared.arrived[c]);
    publish_arrivals();
    publish_to_bulk();
    for (int c = 0, v = 0; v < count; ++c, v += split.chunk) {
      const uint32_t bytes = 16 * (count - v < split.chunk ? count - v : split.chunk);
      bulk_load(slice + v, (const Words*)logits + first + v, bytes, &shared.arrived[c], policy);
    }
    token = load_token(call, row, logits);
    shared.x_id = token.x_id;  // so that it has been read before this block arrives below, and another one may write
  }
  barrier();
  cluster_arrive();  // this block has begun: others may write to its shared memory

  const float levels = levels_of(call), inv_temperature = inv_temperature_of(call);
  Levels mine = no_levels();
  for (int c = 0, begin = 0; begin < count; ++c, begin += split.chunk) {
    const int end = count - begin < split.chunk ? count : begin + split.chunk;
    wait_for(&shared.arrived[c]);
    for (int v = begin + thread(); v < end; v += threads()) {
      float x[kWidth<T>];
      unpack(read_words(slice + v), x, T{});
      visit(mine, x, levels);
    }
  }
  const Levels part = reduce(mine, levels, shared.scratch);
  cluster_wait();
  if (thread() < split.parts) {
    write_remote(&shared.parts[rank].max, thread(), part.max);
    write_remote(&shared.parts[rank].sum, thread(), part.sum);
    write_remote(&shared.parts[rank].weighted, thread(), part.weighted);
  }
  cluster_arrive();
  cluster_wait();  // all parts are here, and no block writes to another one from now on: each may end when it likes

  if (thread() == 0) {
    float top = -INFINITY;
    for (int i = 0; i < split.parts; ++i) top = max_or_nan(top, shared.parts[i].max);
    const float base = base_of(top);
    RowStats<float> s = relative(shared.parts[0], base, inv_temperature);
    for (int i = 1; i < split.parts; ++i) s = merge(s, relative(shared.parts[i], base, inv_temperature));
    // What a NaN leaves behind must not be lost in merge's test for empty parts.
    if (top != top) s.sum = top;
    token.x_id = shared.x_id;
    shared.plan = finish(call, row, token, s, base, rank == 0);
    shared.plan.id_vector = token.id / kWidth<T> - first;
    shared.plan.id_lane = (int)(token.id % kWidth<T>);
  }
  barrier();
  const Plan plan = shared.plan;
  if (plan.zero) {
    for (int v = thread(); v < count; v += threads()) write_words_once(grad + v, Words{{0, 0, 0, 0}});
    return;
  }
  for (int begin = 0; begin < count; begin += split.chunk) {
    const int end = count - begin < split.chunk ? count : begin + split.chunk;
    for (int v = begin + thread(); v < end; v += threads()) {
      float x[kWidth<T>];
      unpack(read_words(slice + v), x, T{});
      differentiate(x, plan.d);
      write_words(slice + v, pack(x, T{}));
      if (v == plan.id_vector) write_one((T*)(slice + v) + plan.id_lane, plan.sampled);
    }
    publish_to_bulk();
    barrier();
    if (thread() == 0) bulk_store(grad + begin, slice + begin, 16 * (end - begin), policy);
  }
  if (thread() == 0) wait_for_bulk_stores();
#endif
}

// ---- host -----------------------------------------------------------------------------------------------------------

int element_size(const Call& call) { return call.dtype == 0 ? 4 : 2; }

bool aligned(const Call& call) {
  const int64_t width = 16 / element_size(call);
  const auto fits = [&](int64_t stride, int64_t count) { return count <= 1 || stride % width == 0; };
  return ((uintptr_t)call.logits | (uintptr_t)call.grad) % 16 == 0 && call.V % width == 0 &&
         fits(call.logits_stride_b, call.B) && fits(call.logits_stride_l, call.L) && fits(call.grad_stride_b, call.B) &&
         fits(call.grad_stride_l, call.L);
}

int slice_bytes(const Split& split) { return (int)sizeof(ClusterShared) + 16 * split.vectors; }

// The smallest cluster whose blocks fit on a multiprocessor three at a time, two or alone; parts 0: two-phase.
Split choose_split(const Call& call, const Machine& m) {
  const int64_t vectors = call.V * element_size(call) / 16;
  if (!call.grad || call.two_phase || !m.clusters || !aligned(call) || 16 * vectors < kSmallestClusterRow) return {0, 0, 0};
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

template <typename T>
const char* grpo_forward(const Call& call, const Machine& m, void* stream) {
  const int64_t rows = call.B * call.L;
  if (call.rewards) {
    const char* wrong = launch(advantage_kernel, (call.B + 127) / 128, 0, 128, 0, stream, call);
    if (wrong) return wrong;
  }
  const Split split = choose_split(call, m);
  if (split.parts > 0) {
    return launch(
        cluster_fwd_kernel<T>, rows * split.parts, split.parts, kClusterThreads, slice_bytes(split), stream, call, split);
  }
  const int count = threads_for(call, call.grad ? kRowThreads : kScoreThreads);
  const int bytes = sizeof(RowShared);
  return call.grad ? launch(rows_fwd_kernel<T, true>, rows, 0, count, bytes, stream, call)
                   : launch(rows_fwd_kernel<T, false>, rows, 0, count, bytes, stream, call);
}

template <typename T>
const char* score_forward(const Call& call, const Machine&, void* stream) {
  const int count = threads_for(call, kScoreThreads);
  return launch(rows_fwd_kernel<T, false>, call.B * call.L, 0, count, sizeof(RowShared), stream, call);
}

template <typename T>
const char* score_backward(const Call& call, const Machine&, void* stream) {
  return launch(score_bwd_kernel<T>, call.B * call.L, 0, threads_for(call, kScoreThreads), 0, stream, call);
}

#define MR1_FOR_DTYPE(function)                                                \
  Machine m;                                                                   \
  if (const char* wrong = machine(&m)) return wrong;                           \
  if (call->dtype == 0) return mr1fast::function<float>(*call, m, stream);     \
  if (call->dtype == 1) return mr1fast::function<BFloat16>(*call, m, stream);  \
  return mr1fast::function<Float16>(*call, m, stream)

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
