// Twin of the CUDA header for the emulator: what the kernels of csrc/cuda use, no more.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "emulator.h"

using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
using cudaError_t = const char*;
inline constexpr cudaError_t cudaSuccess = nullptr;
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::error, nullptr); }
inline const char* cudaGetErrorString(cudaError_t error) { return error; }

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __ffs(uint32_t bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> std::min(shift, 32u));
}

// The GPU faults on an unaligned vector; so must we.
template <typename T>
T __ldcs(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) raise(SIGBUS);
  return *pointer;
}

inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }

inline void __syncthreads() { emulator::meet_block(0); }
inline int __syncthreads_count(int predicate) {
  const uint64_t* brought = emulator::meet_block(predicate != 0);
  int count = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) count += static_cast<int>(brought[i]);
  return count;
}
inline uint32_t __ballot_sync(uint32_t, int predicate) {
  const uint64_t* brought = emulator::meet_warp(predicate != 0);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(brought[lane]) << lane;
  return votes;
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  const uint64_t* brought = emulator::meet_warp(emulator::pack(value));
  T other;
  std::memcpy(&other, &brought[(threadIdx.x % 32) ^ mask], sizeof other);
  return other;
}
