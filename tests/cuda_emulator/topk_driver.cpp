// The emulated launch by a C name, for ctypes; `seed` decides the order in which threads run; `only_grid`: see emulator.h.
#include "topk_logprobs.h"

extern "C" const char* emulate_topk_logprobs(unsigned seed, int only_grid, const dppo::TopkCall* call) {
  emulator::randomness.seed(seed), emulator::only_grid = only_grid;
  return dppo::topk_logprobs_launch(*call, nullptr);
}
