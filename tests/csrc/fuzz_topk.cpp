// The CPU kernel on rows that end where their memory ends, for builds with AddressSanitizer and UndefinedBehaviorSanitizer.
// Compares ids with a stable sort and the LSE with float64; exits with 1 at the first difference.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/topk_logprobs.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

uint32_t bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

// Sixteen-bit rows hold values that both formats represent: small multiples of 1/8.
uint16_t half(float x, dppo::Dtype dtype) {
  if (dtype == dppo::Dtype::bfloat16) return uint16_t(bits(x) >> 16);
  if (x == -INF) return 0xfc00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x == 0) return sign;
  return uint16_t(sign | ((bits(std::fabs(x)) - 0x38000000u) >> 13));
}

void fail(const char* what, int row, int64_t vocab, int k) {
  std::printf("row %d (V %lld, K %d): %s\n", row, static_cast<long long>(vocab), k, what);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  const int rows = argc > 1 ? std::atoi(argv[1]) : 2000;
  std::mt19937 random(7);
  for (int row = 0; row < rows; ++row) {
    const double u = double(random()) / 4294967296.0;
    const auto vocab = int64_t(std::exp(u * std::log(row % 10 ? 9000.0 : 60000.0)));
    const auto max_k = int(std::min<int64_t>(vocab, dppo::MAX_K));  // with the largest K, blocks are taken whole
    const int k = row % 3 ? 1 + int(random() % uint64_t(max_k)) : max_k;
    const auto sampled = int64_t(random() % uint64_t(vocab));
    const auto dtype = dppo::Dtype(row / 7 % 3);
    const float temperature = row % 2 ? 1.0f : 0.25f + float(random() % 100) / 50.0f;
    std::vector<float> values(vocab);
    for (float& x : values) x = float(int(random() % 257) - 128) / 8.0f;
    if (row % 7 == 1) std::sort(values.begin(), values.end());
    if (row % 7 == 2) std::fill(values.begin(), values.end(), values[0]);
    if (row % 7 == 3) {
      for (float& x : values) x = random() % 5 ? -INF : x;
      values[random() % uint64_t(vocab)] = 1.0f;
    }
    std::vector<uint16_t> halves(vocab);
    for (int64_t i = 0; i < vocab; ++i) halves[i] = half(values[i], dtype);
    const void* logits = dtype == dppo::Dtype::float32 ? static_cast<const void*>(values.data()) : halves.data();

    std::vector<int64_t> ids(k + 1), order(vocab);
    std::vector<float> logprobs(k + 1), z(vocab);
    float sampled_logprob = 0, lse = 0;
    dppo::topk_logprobs_row(
        logits, dtype, vocab, sampled, k, temperature, ids.data(), logprobs.data(), &sampled_logprob, &lse);

    for (int64_t i = 0; i < vocab; ++i) z[i] = values[i] / temperature;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[a] > z[b]; });
    double sum = 0;
    for (float x : z) sum += std::exp(double(x) - double(z[order[0]]));
    const double exact = double(z[order[0]]) + std::log(sum);
    if (!std::equal(ids.begin(), ids.begin() + k, order.begin())) fail("ids", row, vocab, k);
    const bool inside = std::find(ids.begin(), ids.begin() + k, sampled) != ids.begin() + k;
    if (ids[k] != (inside ? -1 : sampled)) fail("injected id", row, vocab, k);
    if (std::fabs(lse - exact) > 1e-5 * std::max(1.0, std::fabs(exact))) fail("lse", row, vocab, k);
    for (int j = 0; j < k; ++j) {
      const double expected = double(z[ids[j]]) - exact;
      if (expected == -INF ? logprobs[j] != -INF : !(std::fabs(logprobs[j] - expected) <= 1e-4)) fail("log-prob", row, vocab, k);
    }
    if (logprobs[k] != (inside ? 0.0f : sampled_logprob)) fail("injected log-prob", row, vocab, k);
  }
  // A NaN anywhere, and rows without a finite logit: no particular result, no undefined behaviour.
  for (const float odd : {std::numeric_limits<float>::quiet_NaN(), INF, -INF}) {
    for (const int64_t vocab : {1, 5, 2048, 5000}) {
      std::vector<float> values(vocab, odd == -INF ? -INF : 1.0f);
      values[vocab / 2] = odd;
      const int k = int(std::min<int64_t>(vocab, 20));
      std::vector<int64_t> ids(k + 1);
      std::vector<float> logprobs(k + 1);
      float sampled_logprob = 0, lse = 0;
      dppo::topk_logprobs_row(
          values.data(), dppo::Dtype::float32, vocab, 0, k, 1.0f, ids.data(), logprobs.data(), &sampled_logprob, &lse);
      if (std::isfinite(lse)) fail("LSE of a row that is not finite", -1, vocab, k);
    }
  }
  std::printf("%d rows\n", rows);
  return 0;
}
