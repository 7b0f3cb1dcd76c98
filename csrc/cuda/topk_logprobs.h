// Host interface of the CUDA top-K: plain pointers, sizes and a stream, so that this side compiles without torch.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace dppo {

constexpr int kTopkMaxK = 128;
constexpr int kTopkMaxSplits = 32;

enum LogitsType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Top-K ids and log-probs of every row with the sampled token injected; see topk_logprobs.cu for what each column holds.
//
// All pointers are on the device of `stream`; nothing is allocated and nothing waits. `splits` CTAs share a row.
//   logits           [N, V] of `dtype`, last dimension contiguous, rows `stride_logits_n` elements apart
//   sampled_ids      [N]
//   row_temperature  [N], or nullptr: then `temperature` holds for all rows
//   partial_values   [N, splits, K]   workspace, any content
//   partial_ids      [N, splits, K]   workspace
//   partial_stats    [N, splits, 2]   workspace
//   ids, logprobs    [N, K + 1]
//   sampled_logprobs [N]
//   lse              [N], not finite where the row has NaN, +inf, or nothing above -inf: its other outputs mean nothing then
// Returns nullptr, or a text that says what is wrong.
const char* topk_logprobs_launch(
    const void* logits,
    const int64_t* sampled_ids,
    const float* row_temperature,
    float* partial_values,
    int32_t* partial_ids,
    float* partial_stats,
    int64_t* ids,
    float* logprobs,
    float* sampled_logprobs,
    float* lse,
    int dtype,
    int64_t n,
    int64_t vocab,
    int k,
    int splits,
    float temperature,
    int64_t stride_logits_n,
    cudaStream_t stream);

}  // namespace dppo
