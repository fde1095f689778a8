// What the CUDA kernels ask of the machine, in PTX. tests/cuda_on_host.h offers the same names on a CPU.
#pragma once

#include <assert.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "half.h"

#define MR1_KERNEL __global__
#define MR1_DEVICE __device__ __forceinline__
#define MR1_THREADS(most, resident) __launch_bounds__(most, resident)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MR1_HAS_CLUSTERS 1
#else
#define MR1_HAS_CLUSTERS 0
#endif

namespace mr1fast {

constexpr int kClusterThreads = 512, kRowThreads = 1024, kScoreThreads = 512;
constexpr int kSmallestClusterRow = 16384;  // bytes; below, a row's second visit finds it in the first-level cache

MR1_DEVICE int thread() { return threadIdx.x; }  // among those of its row
MR1_DEVICE int threads() { return blockDim.x; }
MR1_DEVICE int row_in_block() { return threadIdx.y; }
MR1_DEVICE int rows_in_block() { return blockDim.y; }
MR1_DEVICE int64_t block() { return blockIdx.x; }
MR1_DEVICE void barrier() { __syncthreads(); }
MR1_DEVICE void warp_barrier() { __syncwarp(); }

MR1_DEVICE float from_lane(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

MR1_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// A token id out of range stops the device with an assertion, as torch's own kernels do.
MR1_DEVICE void require(bool id_in_range) { assert(id_in_range); }

// ---- 16 bytes at a time ---------------------------------------------------------------------------------------------

struct alignas(16) Words {
  uint32_t w[4];
};

MR1_DEVICE Words read_words(const void* p) { return *(const Words*)p; }
MR1_DEVICE void write_words(void* p, const Words& x) { *(Words*)p = x; }

// For memory that nobody needs again: first to be evicted from the second-level cache.
MR1_DEVICE Words read_words_once(const void* p) {
  Words x;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "l"(p)
               : "memory");
  return x;
}
MR1_DEVICE void write_words_once(void* p, const Words& x) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

MR1_DEVICE void unpack(const Words& x, float (&y)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = __uint_as_float(x.w[i]);
}
MR1_DEVICE void unpack(const Words& x, float (&y)[8], BFloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __uint_as_float(x.w[i] << 16);
    y[2 * i + 1] = __uint_as_float(x.w[i] & 0xffff0000u);
  }
}
MR1_DEVICE void unpack(const Words& x, float (&y)[8], Float16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("{ .reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi; }"
        : "=f"(y[2 * i]), "=f"(y[2 * i + 1])
        : "r"(x.w[i]));
  }
}
MR1_DEVICE Words pack(const float (&y)[4], float) {
  Words x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.w[i] = __float_as_uint(y[i]);
  return x;
}
MR1_DEVICE Words pack(const float (&y)[8], BFloat16) {
  Words x;
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x.w[i]) : "f"(y[2 * i + 1]), "f"(y[2 * i]));
  return x;
}
MR1_DEVICE Words pack(const float (&y)[8], Float16) {
  Words x;
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x.w[i]) : "f"(y[2 * i + 1]), "f"(y[2 * i]));
  return x;
}

MR1_DEVICE float read_one(const float* p) { return *p; }
MR1_DEVICE float read_one(const BFloat16* p) { return __uint_as_float((uint32_t)p->bits << 16); }
MR1_DEVICE float read_one(const Float16* p) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(p->bits));
  return y;
}
MR1_DEVICE void write_one(float* p, float x) { *p = x; }
MR1_DEVICE void write_one(BFloat16* p, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
}
MR1_DEVICE void write_one(Float16* p, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
}

// ---- clusters and bulk copies: compute capability 9.0 ---------------------------------------------------------------

using Arrival = uint64_t;  // an mbarrier in shared memory

#if MR1_HAS_CLUSTERS
MR1_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

MR1_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return (int)rank;
}
// Relaxed: that every thread of the cluster has arrived is all that the threads that have waited know. Released, it would
// cost every warp a fence of all its memory accesses.
MR1_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
MR1_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Starts to write x where another block of the cluster has the address p in its own shared memory, and counts 16 bytes
// at that block's arrival when they are there.
template <typename X>
MR1_DEVICE void send(X* p, const X& x, int rank, Arrival* a) {
  static_assert(sizeof(X) == 16);
  const Words& words = (const Words&)x;
  asm volatile(
      "{\n.reg .u32 to, arrival;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 arrival, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [arrival];\n}"
      :
      : "r"(shared_address(p)), "r"(shared_address(a)), "r"(rank), "r"(words.w[0]), "r"(words.w[1]), "r"(words.w[2]),
        "r"(words.w[3])
      : "memory");
}

MR1_DEVICE void expect_nothing_yet(Arrival* a) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(a)) : "memory");
}
// To the bulk copies and to the blocks of the cluster that have waited for this one.
MR1_DEVICE void publish_arrivals() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The one arrival that expect_nothing_yet has announced, with the number of bytes that are to come.
MR1_DEVICE void expect(Arrival* a, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes) : "memory");
}

// Policy of what nobody reads again: leave the second-level cache first.
MR1_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Starts a copy from global to shared memory; both 16-byte aligned, bytes a multiple of 16 below 2^20.
MR1_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, Arrival* a, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(a)), "l"(policy)
      : "memory");
}
MR1_DEVICE void wait_for(Arrival* a) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n}"
      :
      : "r"(shared_address(a))
      : "memory");
}
MR1_DEVICE void wait_for_cluster(Arrival* a) {  // for what other blocks have sent
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n}"
      :
      : "r"(shared_address(a))
      : "memory");
}

// This thread's writes to shared memory become visible to bulk copies started after the next barrier.
MR1_DEVICE void publish_to_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
MR1_DEVICE void bulk_store(void* to, const void* from, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;"
               :
               : "l"(to), "r"(shared_address(from)), "r"(bytes), "l"(policy)
               : "memory");
}
MR1_DEVICE void wait_for_bulk_stores() {  // until they have read shared memory, which ends with the block
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
#endif

// ---- host -----------------------------------------------------------------------------------------------------------

struct Machine {
  bool clusters;
  int shared_per_block, shared_per_processor;  // bytes of shared memory
  int shared_reserved;                         // bytes that each block costs besides those it asks for
};

struct Threads {  // of a block
  int of_row, rows;
};

inline const char* machine(Machine* m) {
  int device = 0, major = 0;
  cudaError_t e = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr what) {
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(value, what, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&m->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&m->shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&m->shared_reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  m->clusters = major >= 9;
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

template <typename... Parameters, typename... Arguments>
const char* launch(
    void (*kernel)(Parameters...), int64_t blocks, int cluster, Threads threads, int shared_bytes, void* stream,
    Arguments... arguments) {
  if (blocks > INT32_MAX) return "too many rows for one launch";
  cudaError_t e = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    e = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    // Else the driver may leave more to the first-level cache than several such blocks can spare.
    const auto share = cudaFuncAttributePreferredSharedMemoryCarveout;
    if (e == cudaSuccess) e = cudaFuncSetAttribute((const void*)kernel, share, cudaSharedmemCarveoutMaxShared);
  }
  if (e == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(threads.of_row, threads.rows);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 0 ? 1 : 0;
    e = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  }
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace mr1fast
