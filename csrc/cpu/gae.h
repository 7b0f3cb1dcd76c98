// Rewards and values of whole rows -> advantages and returns, backwards over the steps that count. No torch in here.
#pragma once

#include <cstdint>

namespace dppo {

// T is float or double; accumulators are double. Rows lie behind each other.
template <class T>
struct GaeRows {
  int64_t steps;
  double gamma;
  const T* rewards;     // [rows, steps]
  const T* values;      // [rows, steps]
  const uint8_t* mask;  // [rows, steps], 1 = counts, 0 = skipped: its reward and value change nothing, its results are 0
  const double* bootstrap = nullptr;  // [rows], or null: 0
  const double* lam = nullptr;        // [rows], or [1]
  int64_t lam_stride = 0;             // 1 or 0
  const double* lam_value = nullptr;  // [rows], [1], or null: lam
  int64_t lam_value_stride = 0;
  T* advantages = nullptr;    // out [rows, steps]
  T* returns = nullptr;       // out [rows, steps]
  double* moments = nullptr;  // out [rows, 3]: count, mean and centred sum of squares of a row's advantages; or null
};

void gae_rows(const GaeRows<float>& x, int64_t begin, int64_t end);
void gae_rows(const GaeRows<double>& x, int64_t begin, int64_t end);

// x = (x - mean) * scale where mask is 1, else 0.
void whiten_row(float* x, const uint8_t* mask, int64_t steps, double mean, double scale);
void whiten_row(double* x, const uint8_t* mask, int64_t steps, double mean, double scale);

}  // namespace dppo
