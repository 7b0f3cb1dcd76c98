// Ops of the CPU extension on torch's stable ABI. Python allocates, checks and defines the public op; here is only the loop.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "cpu/gae.h"
#include "cpu/topk_logprobs.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

dppo::Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return dppo::Dtype::float32;
    case ScalarType::BFloat16:
      return dppo::Dtype::bfloat16;
    case ScalarType::Half:
      return dppo::Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
}

void check_rows(std::initializer_list<const Tensor*> tensors, int64_t n) {
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(
        tensor->is_cpu() && tensor->is_contiguous() && tensor->size(0) == n, "expected contiguous CPU tensors of ", n, " rows");
  }
}

void topk_logprobs(
    const Tensor& logits,       // [N, V], elements of a row side by side
    const Tensor& sampled_ids,  // [N] int64
    const std::optional<Tensor>& row_temperature,  // [N] float32
    double temperature,
    Tensor ids,               // out [N, K+1] int64
    Tensor logprobs,          // out [N, K+1] float32
    Tensor sampled_logprobs,  // out [N] float32
    Tensor lse) {             // out [N] float32
  const int64_t n = logits.size(0), vocab = logits.size(1), stride = logits.stride(0), k = ids.size(1) - 1;
  if (n == 0) return;
  STD_TORCH_CHECK(1 <= k && k <= std::min<int64_t>(vocab, dppo::MAX_K), "K must be in [1, min(V, ", dppo::MAX_K, ")]");
  STD_TORCH_CHECK(vocab == 1 || logits.stride(1) == 1, "elements of a row of logits must lie side by side");
  check_rows({&sampled_ids, &ids, &logprobs, &sampled_logprobs, &lse, row_temperature ? &*row_temperature : &lse}, n);
  STD_TORCH_CHECK(logprobs.size(1) == k + 1, "ids and logprobs must have the same columns");
  const dppo::Dtype dtype = dtype_of(logits);
  const auto* rows = static_cast<const char*>(logits.const_data_ptr());
  const int64_t row_bytes = stride * int64_t(logits.element_size());
  const auto* sampled = sampled_ids.const_data_ptr<int64_t>();
  const float* temperatures = row_temperature.has_value() ? row_temperature->const_data_ptr<float>() : nullptr;
  auto* ids_out = ids.mutable_data_ptr<int64_t>();
  auto* logprobs_out = logprobs.mutable_data_ptr<float>();
  auto* sampled_out = sampled_logprobs.mutable_data_ptr<float>();
  auto* lse_out = lse.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, 16384 / vocab);  // rows worth starting a thread for
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      dppo::topk_logprobs_row(
          rows + i * row_bytes, dtype, vocab, sampled[i], int(k), temperatures ? temperatures[i] : float(temperature),
          ids_out + i * (k + 1), logprobs_out + i * (k + 1), sampled_out + i, lse_out + i);
    }
  });
}

// A contiguous CPU tensor of this type and number of elements.
template <class T>
T* elements(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.numel() == count, "expected a contiguous CPU tensor of ", count);
  return x.mutable_data_ptr<T>();
}

const uint8_t* mask_bytes(const Tensor& mask, int64_t count) {
  return reinterpret_cast<const uint8_t*>(elements<bool>(mask, count));
}

template <class T>
void gae_of(
    const Tensor& rewards,
    const Tensor& values,
    const Tensor& mask,
    const std::optional<Tensor>& bootstrap,
    double gamma,
    const Tensor& lam,
    const std::optional<Tensor>& lam_value,
    const Tensor& advantages,
    const Tensor& returns,
    const std::optional<Tensor>& moments) {
  const int64_t rows = mask.size(0), steps = mask.size(1), count = rows * steps;
  const auto stride = [rows](const Tensor& x) { return int64_t(x.numel() == rows); };
  dppo::GaeRows<T> x = {steps, gamma, elements<T>(rewards, count), elements<T>(values, count), mask_bytes(mask, count)};
  x.bootstrap = bootstrap ? elements<double>(*bootstrap, rows) : nullptr;
  x.lam_stride = stride(lam);
  x.lam = elements<double>(lam, x.lam_stride ? rows : 1);
  if (lam_value) {
    x.lam_value_stride = stride(*lam_value);
    x.lam_value = elements<double>(*lam_value, x.lam_value_stride ? rows : 1);
  }
  x.advantages = elements<T>(advantages, count);
  x.returns = elements<T>(returns, count);
  x.moments = moments ? elements<double>(*moments, 3 * rows) : nullptr;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(steps, 1));  // rows worth starting a thread for
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { dppo::gae_rows(x, begin, end); });
}

void gae(
    const Tensor& rewards,                   // [B, T] float32 or float64, as values and the results
    const Tensor& values,                    // [B, T]
    const Tensor& mask,                      // [B, T] bool
    const std::optional<Tensor>& bootstrap,  // [B] float64
    double gamma,
    const Tensor& lam,                       // [B] or [1] float64
    const std::optional<Tensor>& lam_value,  // the same
    Tensor advantages,                       // out [B, T]
    Tensor returns,                          // out [B, T]
    std::optional<Tensor> moments) {         // out [B, 3] float64
  STD_TORCH_CHECK(mask.dim() == 2, "mask must be [B, T]");
  const auto run = advantages.scalar_type() == ScalarType::Double ? gae_of<double> : gae_of<float>;
  run(rewards, values, mask, bootstrap, gamma, lam, lam_value, advantages, returns, moments);
}

template <class T>
void whiten_of(const Tensor& x, const Tensor& mask, double mean, double scale) {
  const int64_t rows = mask.size(0), steps = mask.size(1);
  T* elements_of_x = elements<T>(x, rows * steps);
  const uint8_t* mask_of_x = mask_bytes(mask, rows * steps);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(steps, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    dppo::whiten_row(elements_of_x + begin * steps, mask_of_x + begin * steps, (end - begin) * steps, mean, scale);
  });
}

void whiten(Tensor x, const Tensor& mask, double mean, double scale) {  // x [B, T] float32 or float64, in place
  STD_TORCH_CHECK(mask.dim() == 2, "mask must be [B, T]");
  (x.scalar_type() == ScalarType::Double ? whiten_of<double> : whiten_of<float>)(x, mask, mean, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dppo_kernels_C, m) {
  m.def(
      "topk_logprobs(Tensor logits, Tensor sampled_ids, Tensor? row_temperature, float temperature, "
      "Tensor(a!) ids, Tensor(b!) logprobs, Tensor(c!) sampled_logprobs, Tensor(d!) lse) -> ()");
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor mask, Tensor? bootstrap, float gamma, Tensor lam, Tensor? lam_value, "
      "Tensor(a!) advantages, Tensor(b!) returns, Tensor(c!)? moments) -> ()");
  m.def("whiten(Tensor(a!) x, Tensor mask, float mean, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dppo_kernels_C, CPU, m) {
  m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs));
  m.impl("gae", TORCH_BOX(&gae));
  m.impl("whiten", TORCH_BOX(&whiten));
}
