// One row of logits -> its K most likely ids, their log-probs, the sampled token's log-prob and the LSE. No torch in here.
#pragma once

#include <cstdint>

namespace dppo {

constexpr int MAX_K = 128;

enum class Dtype { float32, bfloat16, float16 };

// z = logit / temperature in float32. Columns 0..k-1 are by (z descending, id ascending); column k holds the sampled token
// where it is not among them, else id -1 and log-prob 0. A row with a NaN, with +inf or without a finite logit gets an LSE that
// is not finite, and is otherwise meaningless. 1 <= k <= min(vocab, MAX_K), vocab < 2^31, 0 <= sampled_id < vocab.
void topk_logprobs_row(
    const void* logits,  // [vocab]
    Dtype dtype,
    int64_t vocab,
    int64_t sampled_id,
    int k,
    float temperature,
    int64_t* ids,       // [k + 1]
    float* logprobs,    // [k + 1]
    float* sampled_logprob,
    float* lse);

}  // namespace dppo
