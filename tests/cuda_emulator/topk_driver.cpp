// The emulated launch by a C name, for ctypes; `seed` decides the order in which threads run; `only_grid`: see emulator.h.
#include "topk_logprobs.h"

extern "C" const char* emulate_topk_logprobs(
    unsigned seed,
    int only_grid,
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
    int64_t stride_logits_n) {
  emulator::randomness.seed(seed), emulator::only_grid = only_grid;
  return dppo::topk_logprobs_launch(
      logits, sampled_ids, row_temperature, partial_values, partial_ids, partial_stats, ids, logprobs, sampled_logprobs, lse,
      dtype, n, vocab, k, splits, temperature, stride_logits_n, nullptr);
}
