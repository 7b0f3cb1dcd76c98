// Twin of the CUDA header for the emulator.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};
inline float __low2float(__nv_bfloat162 pair) { return __uint_as_float(uint32_t{pair.x} << 16); }
inline float __high2float(__nv_bfloat162 pair) { return __uint_as_float(uint32_t{pair.y} << 16); }
// A number beats NaN, as on the GPU.
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto larger = [](uint16_t a, uint16_t b) {
    const float of_a = __uint_as_float(uint32_t{a} << 16), of_b = __uint_as_float(uint32_t{b} << 16);
    return of_a >= of_b || std::isnan(of_b) ? a : b;
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
