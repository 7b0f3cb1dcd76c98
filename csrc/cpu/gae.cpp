#include "gae.h"

#include <algorithm>
#include <cstring>

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Long4{__VA_ARGS__})
#endif

namespace dppo {
namespace {

using Double4 = double __attribute__((vector_size(32)));
using Long4 = int64_t __attribute__((vector_size(32)));

constexpr int BLOCK = 16;
constexpr uint64_t ALL_COUNT = 0x0101010101010101;  // eight mask bytes

struct Loops {
  void (*solve_float)(const GaeRows<float>& x, int64_t begin, int64_t end);
  void (*solve_double)(const GaeRows<double>& x, int64_t begin, int64_t end);
  void (*whiten_float)(float* x, const uint8_t* mask, int64_t steps, double mean, double scale);
  void (*whiten_double)(double* x, const uint8_t* mask, int64_t steps, double mean, double scale);
};

#define DPPO_LOOPS "gae_loops.inc"
#include "per_target.inc"

const Loops& loops() {
  static const Loops& picked = pick_loops();
  return picked;
}

}  // namespace

void gae_rows(const GaeRows<float>& x, int64_t begin, int64_t end) { loops().solve_float(x, begin, end); }
void gae_rows(const GaeRows<double>& x, int64_t begin, int64_t end) { loops().solve_double(x, begin, end); }

void whiten_row(float* x, const uint8_t* mask, int64_t steps, double mean, double scale) {
  loops().whiten_float(x, mask, steps, mean, scale);
}
void whiten_row(double* x, const uint8_t* mask, int64_t steps, double mean, double scale) {
  loops().whiten_double(x, mask, steps, mean, scale);
}

}  // namespace dppo
