// The CPU loss head as torch ops in the namespace mr1fast_native, for kernels/cpp.py to call; the arguments are
// documented there and in dispatch.py. It includes no more than torch/library.h, which compiles in seconds, while
// torch/extension.h takes a minute.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <bit>

#include "grpo_cpu.h"
#include "head_gemms.h"

namespace {

using at::Tensor;
using mr1fast::View;
using OptionalTensor = std::optional<Tensor>;

// ---- tensors to views -----------------------------------------------------------------------------------------------

template <typename T>
View<T> view(const Tensor& t, const char* name, const Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.scalar_type() == dtype &&
          t.device().is_cpu(),
      name, " must be a CPU tensor [", like.size(0), ", ", like.size(1), "] of ", dtype, ", got ", t.sizes(), " of ",
      t.scalar_type(), " on ", t.device());
  View<T> v;
  v.data = static_cast<T*>(t.data_ptr());
  v.stride_b = t.stride(0);
  v.stride_l = t.stride(1);
  return v;
}

View<const float> floats(const OptionalTensor& t, const char* name, const Tensor& like) {
  return t ? view<const float>(*t, name, like, at::kFloat) : View<const float>();
}

template <typename T>
View<T> rows(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(
      t.dim() == 3 && t.size(2) > 0 && (t.stride(2) == 1 || t.size(2) == 1) && t.device().is_cpu(),
      name, " must be a CPU tensor [B, L, V] whose last stride is 1, got ", t.sizes(), " with strides ", t.strides());
  View<T> v;
  v.data = static_cast<T*>(t.data_ptr());
  v.stride_b = t.stride(0) * t.element_size();
  v.stride_l = t.stride(1) * t.element_size();
  return v;
}

mr1fast::DType dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat: return mr1fast::DType::kFloat32;
    case at::kBFloat16: return mr1fast::DType::kBFloat16;
    case at::kHalf: return mr1fast::DType::kFloat16;
    default: TORCH_CHECK_VALUE(false, "logits must be float32, bfloat16 or float16, got ", logits.scalar_type());
  }
}

mr1fast::Logits describe(
    const Tensor& logits, const Tensor& ids, const OptionalTensor& mask, double temperature, double softcap,
    const OptionalTensor& temperatures, const OptionalTensor& grad) {
  mr1fast::Logits x{};
  x.z = rows<const char>(logits, "logits");
  x.B = logits.size(0);
  x.L = logits.size(1);
  x.V = logits.size(2);
  x.dtype = dtype_of(logits);
  x.temperature = temperature;
  x.temperatures = floats(temperatures, "temperature", logits);
  x.softcap = softcap;
  x.ids = view<const int64_t>(ids, "completion_ids", logits, at::kLong);
  if (mask) x.mask = view<const bool>(*mask, "completion_mask", logits, at::kBool);
  if (grad) {
    TORCH_CHECK_VALUE(
        grad->sizes() == logits.sizes() && grad->scalar_type() == logits.scalar_type(),
        "the gradient must be like the logits ", logits.sizes(), ", got ", grad->sizes(), " of ", grad->scalar_type());
    x.grad = rows<char>(*grad, "the gradient");
  }
  // Before anything is written: an in-place call that raises leaves the logits as they were.
  int64_t wrong = 0, example = 0;
  for (int64_t b = 0; b < x.B; ++b) {
    for (int64_t l = 0; l < x.L; ++l) {
      const int64_t id = x.ids(b, l);
      if ((id < 0 || id >= x.V) && (!x.mask || x.mask(b, l))) {
        if (wrong++ == 0) example = id;
      }
    }
  }
  TORCH_CHECK_VALUE(
      wrong == 0, "completion_ids (ids) must lie in [0, ", x.V, ") wherever the mask is set, got ", example, " (",
      wrong, " such position(s))");
  return x;
}

// ---- running --------------------------------------------------------------------------------------------------------

void run(mr1fast::Job& job) {
  at::parallel_for(0, job.threads(at::get_num_threads()), 1, [&](int64_t, int64_t) { job.work(); });
}

// Without at::empty's way through the dispatcher.
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }
Tensor new_floats(const Tensor& logits) { return empty(logits.sizes().slice(0, 2), at::kFloat); }
Tensor new_flags(const Tensor& logits) { return empty(logits.sizes().slice(0, 2), at::kBool); }

// A struct whose members are all of type `Member`, or as wide, from the list of their values.
template <typename Struct, typename Member, typename List>
Struct from_list(const List& values, const char* name) {
  std::array<Member, sizeof(Struct) / sizeof(Member)> members;
  TORCH_CHECK_VALUE(
      values.size() == members.size(), "there must be ", members.size(), " ", name, " (csrc/token_loss.h), got ",
      values);
  for (size_t i = 0; i < members.size(); ++i) members[i] = (Member)values[i];
  return std::bit_cast<Struct>(members);
}

mr1fast::RewardScale scale_of(c10::string_view name) {
  using mr1fast::RewardScale;
  return name == "group" ? RewardScale::kGroup : name == "batch" ? RewardScale::kBatch : RewardScale::kNone;
}

// Group-relative advantages, [B, 1] expanded to [B, L].
Tensor advantages_of(const Tensor& rewards, int64_t group, mr1fast::RewardScale scale, const Tensor& logits) {
  const int64_t B = logits.size(0);
  TORCH_CHECK_VALUE(
      rewards.dim() == 1 && rewards.size(0) == B && rewards.scalar_type() == at::kFloat && group > 0 && B % group == 0,
      "rewards must be [", B, "] of Float in groups of num_generations, got ", rewards.sizes(), " of ",
      rewards.scalar_type(), " in groups of ", group);
  const Tensor values = rewards.contiguous(), advantages = empty({B, 1}, at::kFloat);
  const float* r = values.data_ptr<float>();
  using namespace mr1fast;
  const Moments of_batch = scale == RewardScale::kBatch ? reward_moments(r, B) : Moments{};
  for (int64_t first = 0; first < B; first += group) {
    const Moments of_group = reward_moments(r + first, group);
    for (int64_t i = first; i < first + group; ++i) {
      advantages.data_ptr<float>()[i] = group_advantage(r[i], of_group, of_batch, scale);
    }
  }
  return advantages.expand({B, logits.size(1)});
}

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The one pass. From ids to cu_seqlens these are the fields of kernels/reference.py's LossBatch, in its order. Where a
// packed completion begins makes no difference to a token.
LossResult grpo_forward(
    const Tensor& logits, const Tensor& ids, const Tensor& token_weight, const Tensor& beta, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& rewards, int64_t num_generations,
    c10::string_view scale_rewards, const OptionalTensor& old_logps, const OptionalTensor& ref_logps,
    const OptionalTensor& is_ratio, const OptionalTensor& entropy_weight, const OptionalTensor& epsilons_low,
    const OptionalTensor& epsilons_high, const OptionalTensor& temperatures, const OptionalTensor& /*cu_seqlens*/,
    at::IntArrayRef switches, at::ArrayRef<double> numbers, double temperature, double softcap,
    const OptionalTensor& grad) {
  const mr1fast::Logits x = describe(logits, ids, mask, temperature, softcap, temperatures, grad);
  TORCH_CHECK_VALUE(advantages || rewards, "either advantages or rewards must be given");
  const Tensor advantage =
      advantages ? *advantages : advantages_of(*rewards, num_generations, scale_of(scale_rewards), logits);

  mr1fast::Objective objective{};
  objective.spec = {
      from_list<mr1fast::Switches, int32_t>(switches, "switches"),
      from_list<mr1fast::Numbers, float>(numbers, "numbers")};
  objective.entropy_weight = entropy_weight ? entropy_weight->item<float>() : 0.0f;
  objective.advantages = view<const float>(advantage, "advantages", logits, at::kFloat);
  objective.old_logps = floats(old_logps, "old_per_token_logps", logits);
  objective.ref_logps = floats(ref_logps, "ref_per_token_logps", logits);
  objective.is_ratio = floats(is_ratio, "importance_sampling_ratio", logits);
  objective.token_weight = view<const float>(token_weight, "token_weight", logits, at::kFloat);
  if (beta.dim() == 0) {  // strides 0
    objective.beta.data = beta.const_data_ptr<float>();
  } else {
    objective.beta = view<const float>(beta, "beta", logits, at::kFloat);
  }
  objective.epsilon_low = floats(epsilons_low, "epsilon_low", logits);
  objective.epsilon_high = floats(epsilons_high, "epsilon_high", logits);

  Tensor loss = empty({}, at::kFloat), per_token = new_floats(logits), logps = new_floats(logits);
  Tensor entropies = new_floats(logits), kl = ref_logps ? new_floats(logits) : empty({0}, at::kFloat);
  Tensor low = new_flags(logits), high = new_flags(logits), coef = new_floats(logits);
  mr1fast::Outputs out;
  out.loss = per_token.data_ptr<float>();
  out.logps = logps.data_ptr<float>();
  out.entropies = entropies.data_ptr<float>();
  out.kl = ref_logps ? kl.data_ptr<float>() : nullptr;
  out.coef = coef.data_ptr<float>();
  out.is_low = low.data_ptr<bool>();
  out.is_high = high.data_ptr<bool>();

  mr1fast::Job job(x, out, &objective, nullptr);
  run(job);
  *loss.data_ptr<float>() = job.loss();
  return {loss, per_token, logps, entropies, kl, low, high, coef};
}

std::tuple<Tensor, Tensor, Tensor> score_forward(
    const Tensor& logits, const Tensor& ids, const OptionalTensor& mask, double temperature, double softcap,
    const OptionalTensor& temperatures) {
  const mr1fast::Logits x = describe(logits, ids, mask, temperature, softcap, temperatures, std::nullopt);
  Tensor logps = new_floats(logits), entropies = new_floats(logits), lse = new_floats(logits);
  mr1fast::Outputs out;
  out.logps = logps.data_ptr<float>();
  out.entropies = entropies.data_ptr<float>();
  out.lse = lse.data_ptr<float>();
  mr1fast::Job job(x, out, nullptr, nullptr);
  run(job);
  return {logps, entropies, lse};
}

void score_backward(
    const Tensor& logits, const Tensor& ids, const OptionalTensor& mask, const Tensor& lse, const Tensor& entropies,
    const Tensor& grad_logps, const OptionalTensor& grad_entropies, double temperature, double softcap,
    const OptionalTensor& temperatures, const Tensor& grad) {
  const mr1fast::Logits x = describe(logits, ids, mask, temperature, softcap, temperatures, grad);
  mr1fast::ScoreGradient score;
  score.lse = view<const float>(lse, "lse", logits, at::kFloat);
  score.entropies = view<const float>(entropies, "entropies", logits, at::kFloat);
  score.grad_logps = view<const float>(grad_logps, "grad_logps", logits, at::kFloat);
  score.grad_entropies = floats(grad_entropies, "grad_entropies", logits);
  mr1fast::Job job(x, mr1fast::Outputs{}, nullptr, &score);
  run(job);
}

std::string instruction_set() { return mr1fast::instruction_set(); }

}  // namespace

TORCH_LIBRARY(mr1fast_native, m) {
  m.def("instruction_set() -> str", &instruction_set);
  m.def(
      "grpo_forward(Tensor logits, Tensor ids, Tensor token_weight, Tensor beta, Tensor? mask, Tensor? advantages, "
      "Tensor? rewards, int num_generations, str scale_rewards, Tensor? old_logps, Tensor? ref_logps, "
      "Tensor? is_ratio, Tensor? entropy_weight, Tensor? epsilons_low, Tensor? epsilons_high, "
      "Tensor? temperatures, Tensor? cu_seqlens, int[] switches, float[] numbers, float temperature, float softcap, "
      "Tensor(a!)? grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "score_forward(Tensor logits, Tensor ids, Tensor? mask, float temperature, float softcap, Tensor? temperatures) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "score_backward(Tensor logits, Tensor ids, Tensor? mask, Tensor lse, Tensor entropies, Tensor grad_logps, "
      "Tensor? grad_entropies, float temperature, float softcap, Tensor? temperatures, Tensor(a!) grad) -> ()");
  m.def("head_logits(Tensor rows, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("head_weight_gradient(Tensor dlogits, Tensor rows, Tensor(a!) total, bool add) -> ()");
}

TORCH_LIBRARY_IMPL(mr1fast_native, CPU, m) {
  m.impl("grpo_forward", &grpo_forward);
  m.impl("score_forward", &score_forward);
  m.impl("score_backward", &score_backward);
  m.impl("head_logits", &mr1fast::head_logits);
  m.impl("head_weight_gradient", &mr1fast::head_weight_gradient);
}

// `import mr1fast._C` loads the library, and with it the ops above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
