// The machine of csrc/grpo_cuda.cu on a CPU: the names of csrc/cuda_primitives.h, so that the kernels run without a GPU.
//
// Each CUDA thread is a fiber that runs until it must wait; the order among those that can run is random (seeded), bulk
// loads happen only when somebody waits for them and bulk stores only when their end is awaited. A missing barrier thus
// shows as a wrong result, a missing arrival as a deadlock, which is reported.
#pragma once

#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "half.h"

#define MR1_KERNEL
#define MR1_DEVICE inline
#define MR1_THREADS(most, resident)
#define MR1_HAS_CLUSTERS 1

namespace mr1fast {

constexpr int kClusterThreads = 64, kRowThreads = 64, kScoreThreads = 64;
constexpr int kSmallestClusterRow = 128;
constexpr size_t kStack = 65536;

struct Machine {
  bool clusters;
  int shared_per_block, shared_per_processor, shared_reserved;
};
inline Machine host_machine{true, 1 << 20, 1 << 20, 0};
inline std::mt19937 host_random{0};

inline const char* machine(Machine* m) {
  *m = host_machine;
  return nullptr;
}

// ---- fibers ---------------------------------------------------------------------------------------------------------

struct Meeting {  // of `size` threads, again and again
  int size, arrived = 0, generation = 0;
  void arrive() {
    if (++arrived == size) {
      arrived = 0;
      ++generation;
    }
  }
};

struct HostWarp {
  Meeting meeting{32};
  float values[32];
};

struct Arrival {
  int missing;  // bytes; what has come is written when somebody waits for it
  int ready;
};
constexpr int kUnannounced = 1 << 30, kReady = 0x5eed;

struct Transfer {
  Arrival* at;
  void* to;
  std::vector<char> bytes;  // sent by another block
  const void* from;         // else copied from there
  uint32_t count;
};

struct HostBlock {
  int64_t index;
  int rank;
  char* shared;
  Meeting meeting;
  std::vector<HostWarp> warps;
  int begins;  // after so many rounds of the scheduler: the blocks of a cluster need not begin together
  std::vector<Transfer> under_way{};
  int ended = 0;  // threads
};

struct HostCluster {
  std::vector<HostBlock> blocks;
  Meeting meeting;
};

struct BulkStore {
  void* to;
  const void* from;
  uint32_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  HostBlock* block;
  int thread, row;
  int cluster_ticket = 0;
  const int* blocked_on = nullptr;  // runs again once *blocked_on is not blocked_at
  int blocked_at = 0;
  bool done = false;
  std::vector<BulkStore> stores;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline HostCluster* cluster_now = nullptr;
inline std::function<void()> kernel_now;
inline const char* failure = nullptr;
struct Threads {  // of a block
  int of_row, rows;
};
inline Threads threads_now{};

inline void wait_while(const int* word, int value) {
  while (*word == value) {
    current->blocked_on = word;
    current->blocked_at = value;
    swapcontext(&current->context, &scheduler);
  }
}

inline void meet(Meeting& m) {
  const int before = m.generation;
  m.arrive();
  wait_while(&m.generation, before);
}

inline void fiber_main() {
  kernel_now();
  current->done = true;
  ++current->block->ended;
  swapcontext(&current->context, &scheduler);
}

// ---- what a kernel sees ---------------------------------------------------------------------------------------------

inline int thread() { return current->thread; }
inline int threads() { return threads_now.of_row; }
inline int row_in_block() { return current->row; }
inline int rows_in_block() { return threads_now.rows; }
inline int64_t block() { return current->block->index; }
inline void barrier() { meet(current->block->meeting); }
inline char* shared_memory() { return current->block->shared; }

inline HostWarp& warp_now() { return current->block->warps[(current->row * threads() + current->thread) / 32]; }
inline void warp_barrier() { meet(warp_now().meeting); }

inline float from_lane(float x, int mask) {
  HostWarp& warp = warp_now();
  const int lane = current->thread % 32;
  warp.values[lane] = x;
  meet(warp.meeting);
  const float other = warp.values[lane ^ mask];
  meet(warp.meeting);
  return other;
}

inline void fail(const char* why) {
  failure = why;
  current->done = true;
  swapcontext(&current->context, &scheduler);
}
inline void require(bool condition) {
  if (!condition) fail("completion_ids out of range at an unmasked position");
}

struct alignas(16) Words {
  uint32_t w[4];
};
inline Words read_words(const void* p) {
  assert((uintptr_t)p % 16 == 0);
  return *(const Words*)p;
}
inline void write_words(void* p, const Words& x) {
  assert((uintptr_t)p % 16 == 0);
  *(Words*)p = x;
}
inline Words read_words_once(const void* p) { return read_words(p); }
inline void write_words_once(void* p, const Words& x) { write_words(p, x); }

template <typename T, int W>
void unpack(const Words& x, float (&y)[W], T) {
  T values[W];
  memcpy(values, &x, 16);
  for (int i = 0; i < W; ++i) y[i] = to_float(values[i]);
}
template <typename T, int W>
Words pack(const float (&y)[W], T) {
  T values[W];
  for (int i = 0; i < W; ++i) from_float(y[i], values + i);
  Words x;
  memcpy(&x, values, 16);
  return x;
}
template <typename T>
float read_one(const T* p) {
  return to_float(*p);
}
template <typename T>
void write_one(T* p, float x) {
  from_float(x, p);
}

inline int cluster_rank() { return current->block->rank; }
inline void cluster_arrive() {
  current->cluster_ticket = cluster_now->meeting.generation;
  cluster_now->meeting.arrive();
}
inline void cluster_wait() { wait_while(&cluster_now->meeting.generation, current->cluster_ticket); }
template <typename X>
X* in_block(int rank, X* p) {
  return (X*)(cluster_now->blocks[rank].shared + ((char*)p - current->block->shared));
}
template <typename X>
void send(X* p, const X& x, int rank, Arrival* a) {
  static_assert(sizeof(X) == 16);
  HostBlock& receiver = cluster_now->blocks[rank];
  Arrival* arrival = in_block(rank, a);
  if (arrival->ready != kReady) fail("a block was sent something before it had begun");
  if (receiver.ended) fail("a block was sent something after it had ended");
  const char* bytes = (const char*)&x;
  receiver.under_way.push_back({arrival, in_block(rank, p), {bytes, bytes + sizeof x}, nullptr, sizeof x});
  arrival->missing -= sizeof x;
}
inline void expect_nothing_yet(Arrival* a) { *a = {kUnannounced, kReady}; }
inline void publish_arrivals() {}
inline void expect(Arrival* a, uint32_t bytes) { a->missing += (int)bytes - kUnannounced; }
inline uint64_t evict_first() { return 0; }
inline void bulk_load(void* to, const void* from, uint32_t bytes, Arrival* a, uint64_t) {
  assert(((uintptr_t)to | (uintptr_t)from | bytes) % 16 == 0 && bytes > 0 && bytes < 1 << 20);
  current->block->under_way.push_back({a, to, {}, from, bytes});
  a->missing -= (int)bytes;
}
inline void wait_for(Arrival* a) {
  while (a->missing != 0) wait_while(&a->missing, a->missing);
  for (Transfer& t : current->block->under_way) {
    if (t.at != a) continue;
    memcpy(t.to, t.from ? t.from : t.bytes.data(), t.count);
    t.at = nullptr;
  }
}
inline void wait_for_cluster(Arrival* a) { wait_for(a); }
inline void publish_to_bulk() {}
inline void bulk_store(void* to, const void* from, uint32_t bytes, uint64_t) {
  assert(((uintptr_t)to | (uintptr_t)from | bytes) % 16 == 0 && bytes > 0);
  current->stores.push_back({to, from, bytes});
}
inline void wait_for_bulk_stores() {
  for (const BulkStore& s : current->stores) memcpy(s.to, s.from, s.bytes);
  current->stores.clear();
}

// ---- launch ---------------------------------------------------------------------------------------------------------

struct Free {
  void operator()(char* p) const { free(p); }
};

inline const char* run_cluster(HostCluster& cluster) {
  const int of_block = threads_now.of_row * threads_now.rows;
  std::vector<Fiber> fibers(cluster.blocks.size() * of_block);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    f.block = &cluster.blocks[i / of_block];
    f.row = (int)(i % of_block) / threads_now.of_row;
    f.thread = (int)(i % threads_now.of_row);
    f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  std::vector<Fiber*> order;
  for (Fiber& f : fibers) order.push_back(&f);
  for (int round = 0; !failure; ++round) {
    std::shuffle(order.begin(), order.end(), host_random);
    bool any = false, all_done = true;
    for (Fiber* f : order) {
      if (f->done) continue;
      all_done = false;
      any |= round < f->block->begins;
      if (round < f->block->begins) continue;
      if (f->blocked_on && *f->blocked_on == f->blocked_at) continue;
      any = true;
      f->blocked_on = nullptr;
      current = f;
      swapcontext(&scheduler, &f->context);
      if (failure) break;
    }
    if (all_done) {
      for (Fiber& f : fibers) {
        if (!f.stores.empty()) return "a block ended before its bulk stores had read its memory";
      }
      return nullptr;
    }
    if (!any) return "deadlock: every thread waits";
  }
  return failure;
}

template <typename... Parameters, typename... Arguments>
const char* launch(
    void (*kernel)(Parameters...), int64_t blocks, int cluster, Threads threads, int shared_bytes, void*,
    Arguments... arguments) {
  assert(threads.of_row % 32 == 0 && threads.of_row > 0);
  assert(threads.rows == 1 || threads.of_row == 32);
  const int parts = cluster > 0 ? cluster : 1;
  assert(blocks % parts == 0 && shared_bytes <= host_machine.shared_per_block);
  failure = nullptr;
  threads_now = threads;
  kernel_now = [=] { kernel(Parameters(arguments)...); };
  for (int64_t first = 0; first < blocks; first += parts) {
    HostCluster now;
    const int of_block = threads.of_row * threads.rows;
    now.meeting.size = parts * of_block;
    std::vector<std::unique_ptr<char, Free>> memory;
    for (int rank = 0; rank < parts; ++rank) {
      const size_t bytes = (shared_bytes + 255) / 128 * 128;
      memory.emplace_back((char*)aligned_alloc(128, bytes));
      memset(memory.back().get(), 0xff, bytes);  // NaN
      HostBlock b{first + rank, rank, memory.back().get(), {of_block}, std::vector<HostWarp>(of_block / 32),
                  (int)(host_random() % 4 * 64)};
      now.blocks.push_back(std::move(b));
    }
    cluster_now = &now;
    if (const char* wrong = run_cluster(now)) return wrong;
  }
  return nullptr;
}

}  // namespace mr1fast
