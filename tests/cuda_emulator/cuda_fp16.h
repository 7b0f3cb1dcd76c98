// Twin of the CUDA header for the emulator.
#pragma once

#include "cuda_runtime.h"

struct __half2 {
  uint16_t x, y;
};
namespace emulator {
inline float widen_half(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(static_cast<float>(fraction), -24));
}
}  // namespace emulator
inline float __low2float(__half2 pair) { return emulator::widen_half(pair.x); }
inline float __high2float(__half2 pair) { return emulator::widen_half(pair.y); }
// A number beats NaN, as on the GPU.
inline __half2 __hmax2(__half2 a, __half2 b) {
  const auto larger = [](uint16_t a, uint16_t b) {
    const float of_a = emulator::widen_half(a), of_b = emulator::widen_half(b);
    return of_a >= of_b || std::isnan(of_b) ? a : b;
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
