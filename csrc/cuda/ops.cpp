// Ops of the CUDA extension on torch's stable ABI. Python allocates, checks, and says on which stream.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "cuda/topk_logprobs.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

dppo::LogitsType type_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return dppo::kFloat32;
    case ScalarType::BFloat16:
      return dppo::kBFloat16;
    case ScalarType::Half:
      return dppo::kFloat16;
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
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
    Tensor lse,               // out [N] float32
    Tensor partial_values,    // workspace [N, splits, K] float32
    Tensor partial_ids,       // workspace [N, splits, K] int32
    Tensor partial_stats,     // workspace [N, splits, 2] float32
    int64_t stream) {         // cudaStream_t
  const int64_t n = logits.size(0), vocab = logits.size(1);
  if (n == 0) return;
  STD_TORCH_CHECK(vocab == 1 || logits.stride(1) == 1, "elements of a row of logits must lie side by side");
  const int64_t k = ids.size(1) - 1, splits = partial_ids.size(1);
  for (const Tensor* tensor : std::initializer_list<const Tensor*>{
           &sampled_ids, &ids, &logprobs, &sampled_logprobs, &lse, &partial_values, &partial_ids, &partial_stats,
           row_temperature ? &*row_temperature : &lse}) {
    STD_TORCH_CHECK(
        tensor->get_device_index() == logits.get_device_index() && tensor->is_contiguous() && tensor->size(0) == n,
        "expected contiguous tensors of ", n, " rows on the device of logits");
  }
  STD_TORCH_CHECK(
      logprobs.size(1) == k + 1 && partial_ids.size(2) == k && partial_values.size(1) == splits &&
          partial_values.size(2) == k && partial_stats.size(1) == splits && partial_stats.size(2) == 2,
      "outputs or workspace do not fit K and splits");
  const dppo::TopkCall call{
      .logits = logits.const_data_ptr(),
      .sampled_ids = sampled_ids.const_data_ptr<int64_t>(),
      .row_temperature = row_temperature.has_value() ? row_temperature->const_data_ptr<float>() : nullptr,
      .partial_values = partial_values.mutable_data_ptr<float>(),
      .partial_ids = partial_ids.mutable_data_ptr<int32_t>(),
      .partial_stats = partial_stats.mutable_data_ptr<float>(),
      .ids = ids.mutable_data_ptr<int64_t>(),
      .logprobs = logprobs.mutable_data_ptr<float>(),
      .sampled_logprobs = sampled_logprobs.mutable_data_ptr<float>(),
      .lse = lse.mutable_data_ptr<float>(),
      .dtype = type_of(logits),
      .n = n,
      .vocab = vocab,
      .k = int(k),
      .splits = int(splits),
      .temperature = float(temperature),
      .stride_logits_n = logits.stride(0),
  };
  const char* error = dppo::topk_logprobs_launch(call, reinterpret_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == nullptr, "topk_logprobs: ", error ? error : "");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dppo_kernels_C_cuda, m) {
  m.def(
      "topk_logprobs(Tensor logits, Tensor sampled_ids, Tensor? row_temperature, float temperature, "
      "Tensor(a!) ids, Tensor(b!) logprobs, Tensor(c!) sampled_logprobs, Tensor(d!) lse, "
      "Tensor(e!) partial_values, Tensor(f!) partial_ids, Tensor(g!) partial_stats, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dppo_kernels_C_cuda, CUDA, m) {
  m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs));
}
