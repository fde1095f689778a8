// row_kernels.h for AVX-512, AVX2 and any machine, and the choice between them at run time.
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "half.h"
#include "row_step.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms inside GCC 12's own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define MR1_X86 1
#endif

#define MR1_INLINE inline __attribute__((always_inline))
#define MR1_LAMBDA __attribute__((always_inline))

namespace mr1fast {
namespace {

constexpr int kPrefetchBytes = 16384;
constexpr float kFloor = -127.0f, kCeiling = 128.0f;  // 2^-127 is 0 where denormals are flushed, 2^128 is inf
// A block's sum beyond which its shift is called too low: entropies lose digits with the distance to the maximum.
constexpr float kMostSum = 0x1p32f;
constexpr float kRoundMagic = 0x1.8p23f;  // x + magic has the integer nearest to x in its low bits

inline float rate_of(float inv_temperature) { return (float)(1.44269504088896341 * inv_temperature); }

inline void set_negative_infinity(float* x) { *x = -INFINITY; }
inline void set_negative_infinity(BFloat16* x) { x->bits = 0xff80; }
inline void set_negative_infinity(Float16* x) { x->bits = 0xfc00; }

namespace portable {
#include "simd_portable.h"

#include "row_kernels.h"
}  // namespace portable

#ifdef MR1_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "simd_avx2.h"

#include "row_kernels.h"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace avx512 {
#include "simd_avx512.h"

#include "row_kernels.h"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace avx512_bf16 {  // for bfloat16 only
#define MR1_AVX512_BF16
#include "simd_avx512.h"

#include "row_kernels.h"
}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // MR1_X86

template <typename T>
const RowKernels& kernels_of() {
#ifdef MR1_X86
  const std::string name = instruction_set();
  if (name == "avx512_bf16" && std::is_same_v<T, BFloat16>) return avx512_bf16::kRowKernels<BFloat16>;
  if (name == "avx512_bf16" || name == "avx512") return avx512::kRowKernels<T>;
  if (name == "avx2") return avx2::kRowKernels<T>;
#endif
  return portable::kRowKernels<T>;
}

const char* choose_instruction_set() {
  const char* asked = getenv("MR1FAST_CPU");
  const std::string wanted = asked ? asked : "";
#ifdef MR1_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && (wanted.empty() || wanted == "avx512_bf16")) return "avx512_bf16";
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return "avx512";
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return "avx2";
#endif
  if (wanted.empty() || wanted == "portable") return "portable";
  throw std::invalid_argument(
      "MR1FAST_CPU must be one of avx512_bf16, avx512, avx2, portable that this machine has, got " + wanted);
}

}  // namespace

const char* instruction_set() {
  static const char* chosen = choose_instruction_set();
  return chosen;
}

const RowKernels& row_kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return kernels_of<float>();
    case DType::kBFloat16: return kernels_of<BFloat16>();
    default: return kernels_of<Float16>();
  }
}

}  // namespace mr1fast
