// What a worker asks of the vector code: one step of the walk over the rows. row_kernels.cpp compiles it for each
// instruction set.
#pragma once

#include <stdint.h>

#include "grpo_cpu.h"
#include "token_loss.h"

namespace mr1fast {

constexpr int64_t kBlock = 2048;  // logits; this block, the next and one of the previous row fit the first-level cache

// A row's gradient away from the sampled token: x (base + slope d) with d = z - shift, x = exp(d / temperature).
struct RowDerivative {
  float shift, base, slope;
};

// What one step of a worker does: pass 2 of the previous row (if out) and pass 1 of this row (if z).
struct Step {
  const void* z = nullptr;
  float* e = nullptr;  // receives exp((z - maximum of its block) / temperature); null: not kept
  RowStats<float>* stats = nullptr;  // one per block

  void* out = nullptr;
  const float* previous_e = nullptr;  // out = e * scale[block]
  const float* scale = nullptr;
  bool stream = false;  // write past the cache
  const void* previous_z = nullptr;  // not null: out is computed from the logits again
  RowDerivative derivative{0, 0, 0};

  int64_t vocabulary = 0;
  float inv_temperature = 1.0f;
};

using RowKernel = void (*)(const Step&);
RowKernel row_kernel(DType dtype);  // for instruction_set()

}  // namespace mr1fast
