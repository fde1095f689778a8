// What a worker asks of the vector code: one step of the walk over the rows. row_kernels.cpp compiles it for each
// instruction set.
#pragma once

#include <math.h>
#include <stdint.h>

#include "grpo_cpu.h"
#include "token_loss.h"

namespace mr1fast {

constexpr int64_t kBlock = 2048;  // logits whose exponentials are summed in float32; beyond, in float64

// A row's gradient away from the sampled token: x (base + slope d) with d = z - shift, x = exp(d / temperature), times
// the slope of the soft cap, if there is one.
struct RowDerivative {
  float shift, base, slope;
};

// What one step of a worker does: pass 1 of this row (if z) and pass 2 of the previous row (if out).
struct Step {
  const void* z = nullptr;
  RowStats<float>* stats = nullptr;  // one per block; its `max` is what its exponentials are relative to
  // Receives exp((z - max) / temperature) times the slope of the soft cap, perhaps over float32 logits; null: not kept.
  float* e = nullptr;

  void* out = nullptr;
  const float* previous_e = nullptr;  // out = previous_e * scale[block]
  const float* scale = nullptr;
  bool stream = false;  // write past the cache

  int64_t vocabulary = 0;
  float inv_temperature = 1.0f;
  float softcap = INFINITY;  // z stands for softcap * tanh(z / softcap); infinite: for itself
};

// For one dtype and the instruction set of instruction_set().
struct RowKernels {
  void (*step)(const Step&);
  // Pass 2 from the logits, of which nothing was kept; out may be z.
  void (*differentiate)(
      const void* z, void* out, int64_t vocabulary, float inv_temperature, float softcap, const RowDerivative&);
};
const RowKernels& row_kernels(DType dtype);

}  // namespace mr1fast
