// GAE on rows that end where their memory ends, for builds with AddressSanitizer and UndefinedBehaviorSanitizer. Compares with a
// plain loop; exits with 1 at the first difference.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/gae.h"

namespace {

std::mt19937 random_bits(7);

double uniform() { return double(random_bits()) / 4294967296.0; }

void fail(const char* what, int batch, int64_t row, int64_t step, double found, double expected) {
  std::printf("batch %d, row %lld, step %lld: %s %.9g, expected %.9g\n", batch, static_cast<long long>(row),
              static_cast<long long>(step), what, found, expected);
  std::exit(1);
}

// A mask of one of the kinds that there are, with holes that begin and end anywhere.
void fill_mask(uint8_t* mask, int64_t steps, int kind) {
  const auto begin = int64_t(uniform() * double(steps + 1)), end = int64_t(uniform() * double(steps + 1));
  const double share = uniform();
  for (int64_t t = 0; t < steps; ++t) {
    mask[t] = kind == 0 ? 1 : kind == 1 ? 0 : kind == 2 ? t < end : kind == 3 ? t >= begin && t < end : uniform() < share;
  }
}

template <class T>
void check(int batch, double tolerance) {
  const auto rows = int64_t(uniform() * 4), steps = int64_t(uniform() * (batch % 3 ? 70 : 400));
  const auto count = size_t(rows * steps);
  std::vector<T> rewards(count), values(count), advantages(count, T(7)), returns(count, T(7));
  std::vector<uint8_t> mask(count);
  for (int64_t row = 0; row < rows; ++row) fill_mask(mask.data() + row * steps, steps, int(uniform() * 5));
  for (size_t i = 0; i < count; ++i) {
    rewards[i] = mask[i] ? T(uniform() - 0.5) : std::numeric_limits<T>::quiet_NaN();
    values[i] = mask[i] ? T(uniform() - 0.5) : std::numeric_limits<T>::infinity();
  }
  const bool by_row = batch & 1, second = batch & 2, second_by_row = batch & 4, moments_wanted = batch & 8;
  std::vector<double> bootstrap(rows), lam(by_row ? rows : 1), lam_value(second_by_row ? rows : 1), moments(3 * rows);
  for (auto* numbers : {&bootstrap, &lam, &lam_value}) {
    for (double& x : *numbers) x = uniform();
  }
  const double gamma = batch % 5 ? uniform() : 1;
  dppo::GaeRows<T> x = {steps, gamma, rewards.data(), values.data(), mask.data()};
  x.bootstrap = batch & 16 ? bootstrap.data() : nullptr;
  x.lam = lam.data();
  x.lam_stride = by_row;
  x.lam_value = second ? lam_value.data() : nullptr;
  x.lam_value_stride = second_by_row;
  x.advantages = advantages.data();
  x.returns = returns.data();
  x.moments = moments_wanted ? moments.data() : nullptr;
  const int64_t half = rows / 2;  // as two threads would
  dppo::gae_rows(x, half, rows);
  dppo::gae_rows(x, 0, half);

  for (int64_t row = 0; row < rows; ++row) {
    double next = x.bootstrap ? bootstrap[row] : 0, a = 0, g = 0, number = 0, sum = 0, squares = 0;
    const double c = gamma * lam[by_row ? row : 0], d = second ? gamma * lam_value[second_by_row ? row : 0] : c;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t i = row * steps + t;
      double expected = 0, expected_return = 0;
      if (mask[i]) {
        const double delta = rewards[i] + gamma * next - values[i];
        a = delta + c * a;
        g = delta + d * g;
        next = values[i];
        expected = a;
        expected_return = g + values[i];
        number += 1;
        sum += advantages[i];
      }
      if (!(std::fabs(advantages[i] - expected) <= tolerance)) fail("advantage", batch, row, t, advantages[i], expected);
      if (!(std::fabs(returns[i] - expected_return) <= tolerance)) fail("return", batch, row, t, returns[i], expected_return);
    }
    if (!moments_wanted) continue;
    const double mean = number ? sum / number : 0;
    for (int64_t i = row * steps; i < (row + 1) * steps; ++i) {
      if (mask[i]) squares += (advantages[i] - mean) * (advantages[i] - mean);
    }
    const double* found = moments.data() + 3 * row;
    if (found[0] != number) fail("count", batch, row, 0, found[0], number);
    if (!(std::fabs(found[1] - mean) <= 1e-9)) fail("mean", batch, row, 0, found[1], mean);
    if (!(std::fabs(found[2] - squares) <= 1e-9 * (1 + squares))) fail("sum of squares", batch, row, 0, found[2], squares);
  }
  std::vector<T> white = advantages;
  for (int64_t row = 0; row < rows; ++row) dppo::whiten_row(white.data() + row * steps, mask.data() + row * steps, steps, 0.5, 2);
  for (size_t i = 0; i < count; ++i) {
    const double expected = mask[i] ? (advantages[i] - 0.5) * 2 : 0;
    if (!(std::fabs(white[i] - expected) <= tolerance)) fail("whitened", batch, 0, int64_t(i), white[i], expected);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int batches = argc > 1 ? std::atoi(argv[1]) : 2000;
  for (int batch = 0; batch < batches; ++batch) {
    check<float>(batch, 2e-5);
    check<double>(batch, 1e-11);
  }
  std::printf("%d batches\n", batches);
  return 0;
}
