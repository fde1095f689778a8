// Two of the three GEMMs of the loss from hidden states, on a CPU: those whose outer dimension is the vocabulary. Its
// pieces need nothing of each other, so each thread takes one piece after the other and multiplies it alone: operand
// and piece stay in its caches, and no thread waits for another until the end. The multiplication itself is torch's.
#include "head_gemms.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>

namespace mr1fast {
namespace {

// The vocabulary in pieces that are large enough for a GEMM, and many enough that the threads end together.
template <typename Work>
void for_pieces(int64_t V, const Work& work) {
  constexpr int64_t kLeast = 128, kMost = 1024;
  const int64_t threads = at::get_num_threads();
  const int64_t piece = std::clamp(V / (8 * threads) / 64 * 64, kLeast, kMost);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (int64_t first; (first = piece * next.fetch_add(1)) < V;) work(first, std::min(piece, V - first));
  });
}

}  // namespace

void head_logits(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& out) {
  for_pieces(weight.size(0), [&](int64_t first, int64_t count) {
    const Tensor w = weight.narrow(0, first, count).t();
    Tensor z = out.narrow(1, first, count);
    bias ? at::addmm_out(z, bias->narrow(0, first, count), rows, w) : at::mm_out(z, rows, w);
  });
}

void head_weight_gradient(const Tensor& dlogits, const Tensor& rows, Tensor& total, bool add) {
  for_pieces(total.size(0), [&](int64_t first, int64_t count) {
    const Tensor dz = dlogits.narrow(1, first, count).t();
    Tensor sum = total.narrow(0, first, count);
    if (sum.scalar_type() != dz.scalar_type()) {  // a 16-bit GEMM has a 16-bit output: rounded here, the sum is not
      const Tensor product = at::mm(dz, rows);
      add ? sum.add_(product) : sum.copy_(product);
    } else if (add) {
      at::addmm_out(sum, sum, dz, rows);
    } else {
      at::mm_out(sum, dz, rows);
    }
  });
}

}  // namespace mr1fast
