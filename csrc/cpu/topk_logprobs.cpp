// A row is read once, in blocks that stay in the first-level cache. Per block: z and the maxima of its columns (element i is in
// column i mod COLUMNS), the sum of exp(z - max so far), and, where the block's maximum beats the K-th best token found, the
// tokens that do so. Candidates are held as integer keys that order by (z descending, id ascending).
//
// A block with many candidates (the first ones; every one of an ascending row) first raises its bar to the K-th largest column
// maximum: K elements are at least that large, so nothing below it is among the block's K best.

#include "topk_logprobs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace dppo {
namespace {

constexpr int BLOCK = 2048;
constexpr int COLUMNS = 2 * MAX_K;  // more than K of them, for the bar of a crowded block
constexpr int SUM = 256;            // exponentials added in float32 before float64 takes over
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504f;

static_assert(BLOCK % COLUMNS == 0 && BLOCK % SUM == 0);

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }

inline float widen(Float16 x) {
  // The exponent is rebiased by a multiplication, which also normalises subnormals; infinity and NaN keep a full exponent.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = as_float(magnitude) * 0x1p112f;
  const uint32_t bits = as_bits(scaled) | (magnitude >= 0x0f800000 ? 0x7f800000 : 0);
  return as_float(bits | uint32_t(x.bits & 0x8000) << 16);
}

inline float larger(float x, float max) { return x > max ? x : max; }

// What is compiled for several instruction sets, and chosen by what the processor has.
struct Loops {
  float (*scale_float32)(const float* logits, float temperature, float* z, float* column_max);
  float (*scale_bfloat16)(const BFloat16* logits, float temperature, float* z, float* column_max);
  float (*scale_float16)(const Float16* logits, float temperature, float* z, float* column_max);
  double (*sum_exp)(const float* z, float max);

  float scale(const float* x, float t, float* z, float* column_max) const { return scale_float32(x, t, z, column_max); }
  float scale(const BFloat16* x, float t, float* z, float* column_max) const { return scale_bfloat16(x, t, z, column_max); }
  float scale(const Float16* x, float t, float* z, float* column_max) const { return scale_float16(x, t, z, column_max); }
};

#define DPPO_LOOPS "topk_loops.inc"
#include "per_target.inc"

// Larger key = better token. Zeros of both signs are equal.
inline uint64_t make_key(float z, int64_t id) {
  const uint32_t bits = as_bits(z + 0.0f);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(ordered) << 32 | uint32_t(~id);
}

inline float key_value(uint64_t key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

inline int64_t key_id(uint64_t key) { return uint32_t(~uint32_t(key)); }

// The K best tokens so far, and some that may still turn out to be among them.
class Candidates {
 public:
  explicit Candidates(int k) : k_(k), room_(k + std::max(k, 16)) {}

  // A later token with the same value has a higher id and loses: the bar must be exceeded.
  float bar() const { return bar_; }

  void add_block(const float* z, const float* column_max, int64_t first_id) {
    if (std::count_if(column_max, column_max + COLUMNS, [this](float x) { return x > bar_; }) > k_) {
      float best[COLUMNS];
      std::copy_n(column_max, COLUMNS, best);
      std::nth_element(best, best + k_ - 1, best + COLUMNS, std::greater<float>());
      collect(z, column_max, first_id, [bar = best[k_ - 1]](float x) { return x >= bar; });
    } else {
      collect(z, column_max, first_id, [bar = bar_](float x) { return x > bar; });
    }
    if (count_ > room_ || (bar_ == -INF && count_ >= k_)) {
      std::nth_element(keys_, keys_ + k_ - 1, keys_ + count_, std::greater<uint64_t>());
      count_ = k_;
      bar_ = key_value(keys_[k_ - 1]);
    }
  }

  // Sorted; returns how many there are: fewer than K only if all others are -inf.
  int finish() {
    std::sort(keys_, keys_ + count_, std::greater<uint64_t>());
    return std::min(count_, k_);
  }

  uint64_t operator[](int i) const { return keys_[i]; }

 private:
  template <class Passes>
  void collect(const float* z, const float* column_max, int64_t first_id, Passes passes) {
    for (int c = 0; c < COLUMNS; ++c) {
      if (!passes(column_max[c])) continue;
      for (int i = c; i < BLOCK; i += COLUMNS) {
        if (passes(z[i])) keys_[count_++] = make_key(z[i], first_id + i);
      }
    }
  }

  int k_, room_;
  int count_ = 0;
  float bar_ = -INF;
  uint64_t keys_[2 * MAX_K + BLOCK];
};

template <class T>
void score_row(
    const T* logits,
    int64_t vocab,
    int64_t sampled_id,
    int k,
    float temperature,
    int64_t* ids,
    float* logprobs,
    float* sampled_logprob,
    float* lse_out) {
  alignas(64) float z[BLOCK];
  alignas(64) float column_max[COLUMNS];
  static const Loops& loops = pick_loops();
  Candidates held(k);
  float max = -INF;
  double sum = 0;
  for (int64_t first = 0; first < vocab; first += BLOCK) {
    const int64_t n = std::min<int64_t>(BLOCK, vocab - first);
    float block_max = -INF;
    if (n == BLOCK) {
      block_max = loops.scale(logits + first, temperature, z, column_max);
    } else {  // -inf behind the end: no candidate, and nothing in the sum
      std::fill_n(column_max, COLUMNS, -INF);
      std::fill(z + n, z + BLOCK, -INF);
      for (int64_t i = 0; i < n; ++i) {
        z[i] = widen(logits[first + i]) / temperature;
        column_max[i % COLUMNS] = larger(z[i], column_max[i % COLUMNS]);
        block_max = larger(z[i], block_max);
      }
    }
    if (block_max > max) {
      sum *= std::exp(double(max) - double(block_max));
      max = block_max;
    }
    sum += loops.sum_exp(z, max == -INF ? 0.0f : max);
    if (block_max > held.bar()) held.add_block(z, column_max, first);
  }

  const double log_sum = std::log(sum);
  const auto logprob = [max, log_sum](float z) { return float((double(z) - double(max)) - log_sum); };
  const int found = held.finish();
  bool sampled_inside = false;
  for (int j = 0; j < found; ++j) {
    ids[j] = key_id(held[j]);
    logprobs[j] = logprob(key_value(held[j]));
    sampled_inside |= ids[j] == sampled_id;
  }
  // Everything not found is -inf: the lowest of those ids follow.
  for (int64_t id = 0, j = found; j < k; ++id) {
    if (std::find(ids, ids + found, id) != ids + found) continue;
    ids[j] = id;
    logprobs[j] = -INF;
    sampled_inside |= id == sampled_id;
    ++j;
  }
  *lse_out = float(double(max) + log_sum);  // -inf without a finite logit: the sum is not 0
  *sampled_logprob = logprob(widen(logits[sampled_id]) / temperature);
  ids[k] = sampled_inside ? -1 : sampled_id;
  logprobs[k] = sampled_inside ? 0.0f : *sampled_logprob;
}

}  // namespace

void topk_logprobs_row(
    const void* logits,
    Dtype dtype,
    int64_t vocab,
    int64_t sampled_id,
    int k,
    float temperature,
    int64_t* ids,
    float* logprobs,
    float* sampled_logprob,
    float* lse) {
  const auto score = [=](const auto* row) {
    score_row(row, vocab, sampled_id, k, temperature, ids, logprobs, sampled_logprob, lse);
  };
  switch (dtype) {
    case Dtype::float32:
      return score(static_cast<const float*>(logits));
    case Dtype::bfloat16:
      return score(static_cast<const BFloat16*>(logits));
    case Dtype::float16:
      return score(static_cast<const Float16*>(logits));
  }
}

}  // namespace dppo
