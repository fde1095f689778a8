// The cluster kernel: together, the blocks of a thread-block cluster hold a row in their shared memory. The logits are
// read once and the gradient is written once, by bulk copies; what the blocks exchange is three numbers each. For
// 16-byte aligned rows, from compute capability 9.0 on.
#pragma once

#include "cuda_token.cuh"

namespace mr1fast {
namespace {

constexpr int kMaxParts = 8;   // the largest cluster that every device of capability 9.0 takes
constexpr int kChunks = 4;     // bulk copies per block: work begins when the first has arrived
constexpr int kResident = 3;   // blocks per multiprocessor: while one loads, another computes and a third stores

// How a cluster holds a row: `parts` blocks of `vectors` 16-byte vectors each (the last one less), `chunk` to a copy.
struct Split {
  int parts, vectors, chunk;
};

struct alignas(128) ClusterShared {
  Arrival arrived[kChunks];
  Levels parts[kMaxParts];
  Capped<float> x_id;
  Plan plan;
  Scratch scratch;
};

template <typename T, bool kCap>
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
    token = load_token<kCap>(call, row, logits);
    shared.x_id = token.x_id;  // so that it has been read before this block arrives below, and another one may write
  }
  barrier();
  cluster_arrive();  // this block has begun: others may write to its shared memory

  const float rate = rate_of(call, row), inv_temperature = inv_temperature_of(call, row);
  Levels mine = no_levels();
  for (int c = 0, begin = 0; begin < count; ++c, begin += split.chunk) {
    const int end = count - begin < split.chunk ? count : begin + split.chunk;
    wait_for(&shared.arrived[c]);
    for (int v = begin + thread(); v < end; v += threads()) {
      float x[kWidth<T>];
      unpack(read_words(slice + v), x, T{});
      visit<kCap>(mine, x, rate, call.softcap);
    }
  }
  const Levels part = reduce(mine, rate, shared.scratch);
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
      differentiate<kCap>(x, plan.d, call.softcap);
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

}  // namespace
}  // namespace mr1fast
