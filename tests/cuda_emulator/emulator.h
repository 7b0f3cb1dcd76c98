// Runs CUDA kernels as C++20 on a CPU, one block at a time: for results, barriers and bounds, not for speed.
//
// Each thread of a block is a fiber that runs until it must wait for others: at a barrier of its block or a collective of its
// warp (all 32 lanes must come, as kernels here always do). Which fiber goes next, and which warps stay behind, is drawn from a
// seed, so that a missing barrier shows as a result that depends on it. Shared memory holds noise when a block starts. Access to
// memory that is not mapped, and barriers that some threads never reach, end the launch with an error text.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include <ucontext.h>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Meeting {  // of a block or of a warp
  int size = 0, arrived = 0;
  unsigned long generation = 0;
  uint64_t brought[2][1024];  // by generation: those of the last meeting are read while the next one begins
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started, done;
  Meeting* waits_for;
  unsigned long generation;
};

inline constexpr size_t kStackBytes = 64 << 10;
inline std::vector<Fiber> fibers;
inline Meeting block_meeting;
inline std::vector<Meeting> warp_meetings;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline sigjmp_buf fault;
inline unsigned current;
inline std::mt19937 randomness;
inline const char* error = nullptr;
inline bool only_grid = false;  // launches check what a GPU would accept, and run nothing: for grids too large to run here
inline std::vector<void*> noisy;

// Shared memory of a block as its first thread finds it.
inline void fill_with_noise(void* memory, size_t bytes) {
  if (std::find(noisy.begin(), noisy.end(), memory) != noisy.end()) return;
  noisy.push_back(memory);
  std::generate_n(static_cast<char*>(memory), bytes, [] { return static_cast<char>(randomness()); });
}

inline void run_fiber() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

// Waits until all of the meeting have come; what they brought, by lane.
__attribute__((noinline)) inline const uint64_t* meet(Meeting& meeting, unsigned lane, uint64_t brings) {
  Fiber& fiber = fibers[current];
  const unsigned long generation = meeting.generation;
  uint64_t* brought = meeting.brought[generation % 2];
  brought[lane] = brings;
  if (++meeting.arrived == meeting.size) meeting.arrived = 0, ++meeting.generation;
  fiber.waits_for = &meeting, fiber.generation = generation;
  if (!_setjmp(fiber.resume)) _longjmp(scheduler, 1);
  asm volatile("" ::: "memory");
  return brought;
}

inline uint64_t pack(const auto& value) {
  uint64_t bits = 0;
  static_assert(sizeof value <= sizeof bits);
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

inline const uint64_t* meet_block(uint64_t brings) { return meet(block_meeting, threadIdx.x, brings); }
inline const uint64_t* meet_warp(uint64_t brings) { return meet(warp_meetings[threadIdx.x / 32], threadIdx.x % 32, brings); }

// Runs the current fiber until it waits or ends; apart, so that no jump returns into the scheduler's variables.
__attribute__((noinline)) inline void run_current() {
  Fiber& fiber = fibers[current];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  noisy.clear();
  block_meeting.size = threads, block_meeting.arrived = 0;
  warp_meetings.resize(threads / 32);
  for (Meeting& meeting : warp_meetings) meeting.size = 32, meeting.arrived = 0;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    fiber.started = fiber.done = false, fiber.waits_for = nullptr;
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  unsigned left = threads;
  uint32_t lagging = 0;  // warps that rest for a while: between barriers the others run ahead of them
  while (left > 0) {
    std::shuffle(order.begin(), order.end(), randomness);
    if (randomness() % 8 == 0) lagging = randomness() & randomness();
    bool moved = false;
    for (const unsigned thread : order) {
      if (lagging >> thread / 32 & 1) continue;
      current = thread;
      Fiber& fiber = fibers[current];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
      moved = true;
      threadIdx = dim3(current);
      fiber.waits_for = nullptr;
      run_current();
      left -= fibers[current].done;
    }
    if (!moved && !std::exchange(lagging, 0)) {
      error = "emulator: threads wait at a barrier that others never reach";
      return;
    }
  }
}

inline void on_fault(int) { siglongjmp(fault, 1); }

inline void launch(dim3 grid, dim3 block, void* /* stream */, std::function<void()> kernel) {
  if (error) return;
  if (block.x % 32 || block.x > 1024 || block.y > 1 || block.z > 1 || grid.y > 65535 || grid.z > 65535) {
    error = "emulator: this grid cannot be launched";
    return;
  }
  if (only_grid) return;
  body = std::move(kernel), gridDim = grid, blockDim = block;
  struct sigaction action = {}, previous[2];
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &previous[0]), sigaction(SIGBUS, &action, &previous[1]);
  if (sigsetjmp(fault, 1)) {
    error = "emulator: memory that is not mapped was accessed";
  } else {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x && !error; ++x) blockIdx = dim3(x, y, z), run_block();
  }
  sigaction(SIGSEGV, &previous[0], nullptr), sigaction(SIGBUS, &previous[1], nullptr);
}

}  // namespace emulator
