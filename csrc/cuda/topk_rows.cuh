// How topk_logprobs.cu reads a row: 16-byte vectors of three number formats, the temperature, and keys that order candidates.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dppo {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

using Key = unsigned long long;  // (z, id) as one number: larger is better, 0 is none

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Order-preserving map of floats onto unsigned numbers; -0 must have been made +0.
__device__ __forceinline__ unsigned ordered(float z) {
  const unsigned bits = __float_as_uint(z);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(unsigned rank) {
  return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

__device__ __forceinline__ Key make_key(unsigned rank, int id) {
  return static_cast<Key>(rank) << 32 | static_cast<unsigned>(~id);
}
__device__ __forceinline__ unsigned key_rank(Key key) { return static_cast<unsigned>(key >> 32); }
__device__ __forceinline__ float key_z(Key key) { return unordered(key_rank(key)); }
__device__ __forceinline__ int key_id(Key key) { return ~static_cast<int>(static_cast<unsigned>(key)); }

// Terms below the smallest normal number add nothing to a sum of at least 1: flushing them saves two instructions.
__device__ __forceinline__ float exp2_flushed(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// One of four words by an index that is not known to the compiler: an array would have to live in memory.
__device__ __forceinline__ uint32_t pick_word(const uint32_t (&words)[4], int w) {
  const uint32_t low = w & 1 ? words[1] : words[0], high = w & 1 ? words[3] : words[2];
  return w & 2 ? high : low;
}

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kElements = 4;  // of a 16-byte vector
  static constexpr uint32_t kNegativeInfinity = 0xff800000u;
  static __device__ __forceinline__ float element(const uint32_t (&words)[4], int e) { return __uint_as_float(words[e]); }
  static __device__ __forceinline__ float pick(const uint32_t (&words)[4], int e) {
    return __uint_as_float(pick_word(words, e));
  }
  static __device__ __forceinline__ float largest(const uint32_t (&words)[4]) {
    return fmaxf(fmaxf(element(words, 0), element(words, 1)), fmaxf(element(words, 2), element(words, 3)));
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kElements = 8;
  static constexpr uint32_t kNegativeInfinity = 0xff80u;
  static __device__ __forceinline__ float element(const uint32_t (&words)[4], int e) {
    return __uint_as_float(e % 2 ? words[e / 2] & 0xffff0000u : words[e / 2] << 16);
  }
  static __device__ __forceinline__ float pick(const uint32_t (&words)[4], int e) {
    return __uint_as_float(pick_word(words, e / 2) >> (e % 2 * 16) << 16);
  }
  static __device__ __forceinline__ __nv_bfloat162 pair(const uint32_t& word) {
    return reinterpret_cast<const __nv_bfloat162&>(word);
  }
  static __device__ __forceinline__ float largest(const uint32_t (&words)[4]) {
    const __nv_bfloat162 best =
        __hmax2(__hmax2(pair(words[0]), pair(words[1])), __hmax2(pair(words[2]), pair(words[3])));
    return fmaxf(__low2float(best), __high2float(best));
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kElements = 8;
  static constexpr uint32_t kNegativeInfinity = 0xfc00u;
  static __device__ __forceinline__ __half2 pair(const uint32_t& word) { return reinterpret_cast<const __half2&>(word); }
  static __device__ __forceinline__ float element(const uint32_t (&words)[4], int e) {
    return e % 2 ? __high2float(pair(words[e / 2])) : __low2float(pair(words[e / 2]));
  }
  static __device__ __forceinline__ float pick(const uint32_t (&words)[4], int e) {
    const uint32_t word = pick_word(words, e / 2) >> (e % 2 * 16);
    return __low2float(pair(word));
  }
  static __device__ __forceinline__ float largest(const uint32_t (&words)[4]) {
    const __half2 best = __hmax2(__hmax2(pair(words[0]), pair(words[1])), __hmax2(pair(words[2]), pair(words[3])));
    return fmaxf(__low2float(best), __high2float(best));
  }
};

// Temperature of a row; division is rounded as IEEE says, for ties are part of the contract.
struct Scale {
  float temperature;
  float log2e;  // over the temperature
  bool divides;

  __device__ __forceinline__ Scale(const float* row_temperature, int64_t row, float scalar) {
    temperature = row_temperature ? row_temperature[row] : scalar;
    log2e = __fdiv_rn(kLog2E, temperature);
    divides = temperature != 1.0f;
  }

  __device__ __forceinline__ float operator()(float logit) const { return divides ? __fdiv_rn(logit, temperature) : logit; }

  // No logit whose z has this rank, or a higher one, is below: z by more than division rounds, and the product rounds
  // monotonically.
  __device__ __forceinline__ float lowest(unsigned least) const {
    const float z = unordered(least);
    return (fabsf(z) > 1e-30f ? fmaf(-1e-6f, fabsf(z), z) : -2e-30f) * temperature;
  }

  // z as an unsigned number. NaN, whose row is lost, becomes -inf: it could be in any number of lists. + 0 makes 0 of -0.
  __device__ __forceinline__ unsigned rank(float logit) const { return ordered(fmaxf((*this)(logit), -infinity()) + 0.0f); }
};

// Drops the first element of a vector, and makes `bits` its last.
template <typename Logits>
__device__ __forceinline__ void shift_in(uint32_t (&words)[4], uint32_t bits) {
  constexpr int kBits = 8 * sizeof(typename Logits::Bits);
#pragma unroll
  for (int w = 0; w < 3; ++w) words[w] = __funnelshift_rc(words[w], words[w + 1], kBits);
  words[3] = __funnelshift_rc(words[3], bits, kBits);
}

// A row of logits in positions: position p is id p - head, and positions that are multiples of a vector are aligned in memory.
template <typename Logits>
struct Row {
  const typename Logits::Bits* start;
  unsigned head;  // position of the first id

  __device__ __forceinline__ explicit Row(const typename Logits::Bits* start)
      : start(start),
        head(static_cast<unsigned>(reinterpret_cast<uintptr_t>(start) % 16 / sizeof(typename Logits::Bits))) {}

  __device__ __forceinline__ const typename Logits::Bits* at(unsigned position) const {
    return start + (static_cast<int64_t>(position) - static_cast<int64_t>(head));
  }

  // The vector at `position`, which lies in the row. Nobody reads it again: it need not stay in a cache.
  __device__ __forceinline__ void load_whole(uint32_t (&words)[4], unsigned position) const {
    const uint4 vector = __ldcs(reinterpret_cast<const uint4*>(at(position)));
    words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
  }

  // The vector at `position`; what lies before the row, or at and behind `stop`, is -inf and not read.
  __device__ __forceinline__ void load(uint32_t (&words)[4], unsigned position, unsigned stop) const {
    if (position >= head && position + Logits::kElements <= stop) {
      load_whole(words, position);
      return;
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = Logits::kNegativeInfinity * (Logits::kElements == 8 ? 0x10001u : 1u);
    if (position >= stop) return;
#pragma unroll 1  // rare, and registers are dear
    for (int e = 0; e < Logits::kElements; ++e) {
      const bool inside = position + e >= head && position + e < stop;
      shift_in<Logits>(words, inside ? at(position)[e] : Logits::kNegativeInfinity);
    }
  }
};

}  // namespace
}  // namespace dppo
