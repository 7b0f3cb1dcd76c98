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

// Loops are compiled for several instruction sets and chosen when the library is loaded. Sanitizers run before the choice.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(DPPO_ONE_TARGET)
#define PER_TARGET __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PER_TARGET
#endif

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

// 2^x for x <= 0, to 2e-7; below -126 it is 2^-126 = 1e-38, which no sum notices. NaN stays NaN.
inline float exp2_nonpositive(float x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < -126.0f ? -126.0f : x;
  const float shifted = x + ROUND;
  const float r = x - (shifted - ROUND);
  float p = 1.32764720e-3f;  // minimax in relative error on [-1/2, 1/2]
  p = p * r + 9.67554133e-3f;
  p = p * r + 5.55071327e-2f;
  p = p * r + 2.40221197e-1f;
  p = p * r + 6.93146967e-1f;
  p = p * r + 1.0f;
  return p * as_float((as_bits(shifted) << 23) + 0x3f800000);
}

inline float larger(float x, float max) { return x > max ? x : max; }

// z of a whole block, the largest of every column, and of all (NaNs are passed over: they reach the sum).
template <class T>
inline float scale_block(const T* logits, float temperature, float* z, float* column_max) {
  std::fill_n(column_max, COLUMNS, -INF);
  if (temperature == 1.0f) {
    for (int first = 0; first < BLOCK; first += COLUMNS) {
      for (int c = 0; c < COLUMNS; ++c) {
        z[first + c] = widen(logits[first + c]);
        column_max[c] = larger(z[first + c], column_max[c]);
      }
    }
  } else {
    for (int first = 0; first < BLOCK; first += COLUMNS) {
      for (int c = 0; c < COLUMNS; ++c) {
        z[first + c] = widen(logits[first + c]) / temperature;
        column_max[c] = larger(z[first + c], column_max[c]);
      }
    }
  }
  float max = -INF;
#pragma omp simd reduction(max : max)
  for (int c = 0; c < COLUMNS; ++c) max = larger(column_max[c], max);
  return max;
}

PER_TARGET float scale(const float* logits, float temperature, float* z, float* column_max) {
  return scale_block(logits, temperature, z, column_max);
}

PER_TARGET float scale(const BFloat16* logits, float temperature, float* z, float* column_max) {
  return scale_block(logits, temperature, z, column_max);
}

PER_TARGET float scale(const Float16* logits, float temperature, float* z, float* column_max) {
  return scale_block(logits, temperature, z, column_max);
}

PER_TARGET double sum_exp(const float* z, float max) {
  double total = 0;
  for (int first = 0; first < BLOCK; first += SUM) {
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int i = 0; i < SUM; ++i) part += exp2_nonpositive((z[first + i] - max) * LOG2_E);
    total += part;
  }
  return total;
}

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
    float bar = bar_;
    if (std::count_if(column_max, column_max + COLUMNS, [bar](float x) { return x > bar; }) > k_) {
      float best[COLUMNS];
      std::copy_n(column_max, COLUMNS, best);
      std::nth_element(best, best + k_ - 1, best + COLUMNS, std::greater<float>());
      bar = std::nextafter(best[k_ - 1], -INF);  // > this means >= the K-th largest maximum
    }
    for (int c = 0; c < COLUMNS; ++c) {
      if (!(column_max[c] > bar)) continue;
      for (int i = c; i < BLOCK; i += COLUMNS) {
        if (z[i] > bar) keys_[count_++] = make_key(z[i], first_id + i);
      }
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
  Candidates held(k);
  float max = -INF;
  double sum = 0;
  for (int64_t first = 0; first < vocab; first += BLOCK) {
    const int64_t n = std::min<int64_t>(BLOCK, vocab - first);
    float block_max = -INF;
    if (n == BLOCK) {
      block_max = scale(logits + first, temperature, z, column_max);
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
    sum += sum_exp(z, max == -INF ? 0.0f : max);
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
  switch (dtype) {
    case Dtype::float32:
      return score_row(static_cast<const float*>(logits), vocab, sampled_id, k, temperature, ids, logprobs, sampled_logprob, lse);
    case Dtype::bfloat16:
      return score_row(static_cast<const BFloat16*>(logits), vocab, sampled_id, k, temperature, ids, logprobs, sampled_logprob, lse);
    case Dtype::float16:
      return score_row(static_cast<const Float16*>(logits), vocab, sampled_id, k, temperature, ids, logprobs, sampled_logprob, lse);
  }
}

}  // namespace dppo
