// See head_gemms.cpp. Shapes: n rows, V vocabulary, H hidden; CPU tensors. kernels/linear.py calls these.
#pragma once

#include <ATen/core/Tensor.h>

namespace mr1fast {

using at::Tensor;

// out [n, V] = rows [n, H] @ weight [V, H].T (+ bias [V]), all of one dtype.
void head_logits(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& out);

// total [V, H] = or += dlogits [n, V].T @ rows [n, H]; total may be float32 where the others have 16 bits.
void head_weight_gradient(const Tensor& dlogits, const Tensor& rows, Tensor& total, bool add);

}  // namespace mr1fast
