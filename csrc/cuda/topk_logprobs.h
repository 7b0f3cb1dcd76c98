// Host interface of the CUDA top-K: plain pointers, sizes and a stream, so that this side compiles without torch.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace dppo {

constexpr int kTopkMaxK = 128;
constexpr int kTopkMaxSplits = 32;

enum LogitsType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One call. All pointers are on one device; `splits` CTAs share a row.
struct TopkCall {
  const void* logits;            // [N, V] of `dtype`, last dimension contiguous, rows `stride_logits_n` elements apart
  const int64_t* sampled_ids;    // [N]
  const float* row_temperature;  // [N], or nullptr: then `temperature` holds for all rows
  float* partial_values;         // [N, splits, K] workspace, any content
  int32_t* partial_ids;          // [N, splits, K] workspace
  float* partial_stats;          // [N, splits, 2] workspace
  int64_t* ids;                  // [N, K + 1]
  float* logprobs;               // [N, K + 1]
  float* sampled_logprobs;       // [N]
  float* lse;  // [N], not finite where a row has NaN, +inf, or nothing above -inf: its other outputs mean nothing then
  int dtype;   // a LogitsType
  int64_t n;
  int64_t vocab;
  int k;
  int splits;
  float temperature;
  int64_t stride_logits_n;
};

// Top-K ids and log-probs of every row with the sampled token injected; see topk_logprobs.cu for what each column holds.
// Nothing is allocated and nothing waits. Returns nullptr, or a text that says what is wrong.
const char* topk_logprobs_launch(const TopkCall& call, cudaStream_t stream);

}  // namespace dppo
