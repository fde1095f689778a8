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

struct alignas(16) Part {  // as long as one asynchronous store
  Levels levels;
};

struct alignas(128) ClusterShared {
  Part parts[kMaxParts];
  Arrival chunk_arrived[kChunks], parts_arrived;
  Token token;
  Plan plan;
  Levels of_warps[kMaxWarps];
};

// Turns the block's part of the row into its gradient, and stores it chunk by chunk. grad: of the part's first element.
template <typename T, bool kCap, bool kBonus>
MR1_DEVICE void write_part(
    Words* slice, Words* grad, int count, const Split& split, const Plan& plan, float softcap, uint64_t policy) {
  for (int begin = 0; begin < count; begin += split.chunk) {
    const int end = count - begin < split.chunk ? count : begin + split.chunk;
    for (int v = begin + thread(); v < end; v += threads()) {
      write_words(slice + v, gradient_of<T, kCap, kBonus>(read_words(slice + v), plan, softcap));
      if (v == plan.id_vector) write_one((T*)(slice + v) + plan.id_lane, plan.sampled);
    }
    publish_to_bulk();
    barrier();
    if (thread() == 0) bulk_store(grad + begin, slice + begin, 16 * (end - begin), policy);
  }
  if (thread() == 0) wait_for_bulk_stores();
}

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
  if (thread() == 0) {
    for (int c = 0; c < kChunks; ++c) expect_nothing_yet(&shared.chunk_arrived[c]);
    expect_nothing_yet(&shared.parts_arrived);
    publish_arrivals();
    expect(&shared.parts_arrived, split.parts * sizeof(Part));
    publish_to_bulk();
    for (int c = 0, v = 0; v < count; ++c, v += split.chunk) {
      const uint32_t bytes = 16 * (count - v < split.chunk ? count - v : split.chunk);
      expect(&shared.chunk_arrived[c], bytes);
      bulk_load(slice + v, (const Words*)logits + first + v, bytes, &shared.chunk_arrived[c], policy);
    }
  }
  barrier();
  // Stored at once, so that the id's logit has been read when this thread comes to the barrier in reduce, behind which
  // this block sends its part. Without all parts no block overwrites the row, and a value once read cannot change.
  if (thread() == 0) shared.token = load_token<kCap>(call, row, logits);
  // This block has begun, and others may send to it. No data is handed over here, so that nothing need be released: what
  // others use, parts_arrived, is published by its own fence, in the thread that has set it up.
  cluster_arrive();

  const float rate = rate_of(call, row);
  Levels mine = no_levels();
  for (int c = 0, begin = 0; begin < count; ++c, begin += split.chunk) {
    const int end = count - begin < split.chunk ? count : begin + split.chunk;
    wait_for(&shared.chunk_arrived[c]);
    for (int v = begin + thread(); v < end; v += threads()) {
      float x[kWidth<T>];
      unpack(read_words(slice + v), x, T{});
      visit<kCap>(mine, x, rate, call.softcap);
    }
  }
  const Part part{reduce(mine, rate, shared.of_warps)};
  cluster_wait();  // every block has begun
  // The store itself counts its bytes at the receiver, after it has been made (a release at cluster scope), and the
  // receiver's wait is the acquire: the part is all that is handed over, and no thread needs a fence. Each block ends
  // only after it has every part, so that nobody sends to a block that is gone; what it has sent needs nothing of it.
  // A block that holds a row alone sends nothing (compute-sanitizer takes that for an error): its one part stays with the
  // thread that reads it.
  const bool alone = split.parts == 1;
  if (!alone && thread() < split.parts) send(&shared.parts[rank], part, thread(), &shared.parts_arrived);
  if (alone && thread() == 0) shared.parts[0] = part;

  if (thread() < 32) {
    if (!alone) wait_for_cluster(&shared.parts_arrived);
    const Levels part = thread() < split.parts ? shared.parts[thread()].levels : no_levels();
    const Levels s = reduce_warp(part, rate);
    if (thread() == 0) {
      const int64_t id = shared.token.id;
      shared.plan = finish(call, row, shared.token, s, rank == 0);
      shared.plan.id_vector = id / kWidth<T> - first;
      shared.plan.id_lane = (int)(id % kWidth<T>);
    }
  }
  barrier();
  const Plan plan = shared.plan;
  if (plan.zero) {
    for (int v = thread(); v < count; v += threads()) write_words_once(grad + v, Words{{0, 0, 0, 0}});
  } else if (plan.d.slope == 0.0f) {
    write_part<T, kCap, false>(slice, grad, count, split, plan, call.softcap, policy);
  } else {
    write_part<T, kCap, true>(slice, grad, count, split, plan, call.softcap, policy);
  }
#endif
}

}  // namespace
}  // namespace mr1fast
