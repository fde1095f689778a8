// The C interface of the CUDA loss head, which kernels/cuda.py mirrors with ctypes: it needs no header of torch or
// CUDA.
#pragma once

#include <stdint.h>

#include "token_loss.h"

// One call. Every pointer is on the device and may be null where the argument is None; strides count elements. [B, L]
// tensors are contiguous unless strides are given here. The order of the fields is that of `cuda.RowsCall`.
struct Mr1RowsCall {
  const void* logits;  // [B, L, V], last stride 1
  void* grad;          // likewise; may be the logits; null: no gradient
  const int64_t* ids;
  const uint8_t* mask;
  const float* advantages;  // with strides; null: from rewards [B]
  const float* rewards;
  float* advantage_space;  // [B], written if there are rewards
  const float *old_logps, *ref_logps, *is_ratio, *token_weight;
  const float* entropy_weight;  // []
  const float *beta, *epsilon_low, *epsilon_high;  // with strides; the latter two null: those of the spec
  const float* temperatures;  // null: the numbers below
  float *share, *loss, *logps, *entropies, *kl, *coef, *lse;  // out; share: what a token adds to the loss
  uint8_t *is_low, *is_high;
  const float *grad_logps, *grad_entropies;  // in, for the backward of scoring; so are then lse and entropies

  int64_t B, L, V;
  int64_t logits_stride_b, logits_stride_l, grad_stride_b, grad_stride_l;
  int64_t advantage_stride_b, advantage_stride_l, is_ratio_stride_b, is_ratio_stride_l;
  int64_t weight_stride_b, weight_stride_l, beta_stride_b, beta_stride_l;
  int64_t epsilon_low_stride_b, epsilon_low_stride_l, epsilon_high_stride_b, epsilon_high_stride_l;
  int64_t num_generations;
  mr1fast::TokenSpec spec;
  float inv_temperature, rate;  // 1 and log2(e) over the temperature
  float softcap;                // of the logits; infinite: none
  int32_t dtype;          // 0 float32, 1 bfloat16, 2 float16
  int32_t scale_rewards;  // mr1fast::RewardScale
  int32_t two_phase;  // not 0: the path without a cluster even where a cluster fits (tests and benchmarks)
};

#define MR1_EXPORT extern "C" __attribute__((visibility("default")))

MR1_EXPORT int64_t mr1_sizeof_call();

// Each enqueues its work on the stream (a cudaStream_t of the current device); null, or what went wrong.
MR1_EXPORT const char* mr1_grpo_forward(const Mr1RowsCall* call, void* stream);
MR1_EXPORT const char* mr1_score_forward(const Mr1RowsCall* call, void* stream);
MR1_EXPORT const char* mr1_score_backward(const Mr1RowsCall* call, void* stream);

// "cluster of 4, 77056 bytes each" or "two-phase, 1024 threads": the path grpo_forward would take.
MR1_EXPORT const char* mr1_grpo_path(const Mr1RowsCall* call);
