// Ops of the CPU extension on torch's stable ABI. Python allocates, checks and defines the public op; here is only the loop.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dppo_kernels_C, m) {
  m.def(
      "topk_logprobs(Tensor logits, Tensor sampled_ids, Tensor? row_temperature, float temperature, "
      "Tensor(a!) ids, Tensor(b!) logprobs, Tensor(c!) sampled_logprobs, Tensor(d!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dppo_kernels_C, CPU, m) {
  m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs));
}
