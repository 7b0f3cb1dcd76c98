// Top-K log-probs with the sampled token injected, in one read of the logits.
//
//   z = logits / temperature        lse = log sum exp z        logprob = z - lse
//   columns 0..K-1: by (z descending, id ascending); fewer than K above -inf: then the lowest of the other ids, log-prob -inf
//   column K: the sampled id and its log-prob; where it is among the first K: -1 and 0
//
// topk_partial_kernel: grid (N, S); a CTA reads one of S segments of a row and leaves in the workspace (maximum logit,
// sum of exp(z - its z)) [N, S, 2], and its sorted top-K: z [N, S, K], ids [N, S, K], -1 = none.
// topk_merge_kernel: grid N; merges S lists and sums, reads the sampled logit, writes all outputs.
// Atomics only choose where in a buffer a candidate lies; its rank follows from (z, id), so results are deterministic.

#include "topk_logprobs.h"

#include <cmath>

#include "topk_rows.cuh"

#ifdef __CUDACC__
#define DPPO_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define DPPO_SHARED(type, name) __shared__ type name
#else  // tests/cuda_emulator
#define DPPO_LAUNCH(kernel, grid, block, stream, ...) emulator::launch(grid, block, stream, [=] { kernel(__VA_ARGS__); })
#define DPPO_SHARED(type, name) \
  static type name;             \
  emulator::fill_with_noise(&name, sizeof name)
#endif

namespace dppo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 5;
constexpr int kMaxK = kTopkMaxK;
constexpr int kMaxSplits = kTopkMaxSplits;
constexpr int kVectors = 2;  // 16-byte vectors a lane reads at a time: 5 CTAs have 40 KB in flight, 6 with one each only 24
constexpr int kSlack = 64;  // candidates beyond K that wait for a flush: it costs their number squared
constexpr int kCrowd = 64;  // lanes that may all append without the sieve, for small K too
constexpr unsigned kAllLanes = 0xffffffffu;

template <int kCapacity>
struct Candidates {
  Key keys[kCapacity];
  Key best[kMaxK];
  int held;
  int tied[kVectors * kWarps];
  float warp_max[kWarps], warp_sum[kWarps];
};

// Puts the best K of the held candidates into `best`, in order, and holds no others. Returns the new threshold.
// Needs a barrier before it; the next access of another kind than reading `best` needs one too.
template <int kCapacity>
__device__ __forceinline__ unsigned flush(Candidates<kCapacity>& shared, int k) {
  const int n = shared.held, thread = threadIdx.x;
  for (int i = thread; i < n; i += kThreads) {
    const Key key = shared.keys[i];
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < n; ++j) rank += shared.keys[j] > key;
    if (rank < k) shared.best[rank] = key;
  }
  __syncthreads();
  const int kept = min(n, k);
  if (thread < kept) shared.keys[thread] = shared.best[thread];
  if (thread == 0) shared.held = kept;
  return n < k ? ordered(-infinity()) : key_rank(shared.best[k - 1]);
}

// Too many lanes offer: finds a floor that K lanes reach, by bisection over their maxima. What is below it is beaten by those.
//
// If the floor is a value that too many lanes tie on, then `above` < K lanes exceed it, and only the first K - above tied
// vectors take part, in the order of their ids (the rank of the others becomes 0): an element of a later one is beaten by
// those lanes and by those vectors' maxima, which are equal to it and have lower ids.
template <int kCapacity>
__device__ __forceinline__ unsigned sieve(
    Candidates<kCapacity>& shared, unsigned (&ranks)[kVectors], unsigned threshold, int k) {
  const int warp = threadIdx.x / 32, limit = max(k, kCrowd);
  unsigned mine = ranks[0];
#pragma unroll
  for (int v = 1; v < kVectors; ++v) mine = max(mine, ranks[v]);
  unsigned low = threshold, high = ordered(infinity()) + 1;  // more than `limit` are at least low + 1, `above` at least high
  int above = 0;
  while (high - low > 1) {
    const unsigned middle = low + (high - low) / 2;
    const int count = __syncthreads_count(mine >= middle);
    if (count > limit) {
      low = middle;
    } else if (count < k) {
      high = middle, above = count;
    } else {
      return middle;
    }
  }
  int place[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const unsigned votes = __ballot_sync(kAllLanes, ranks[v] == low);
    place[v] = __popc(votes & ((1u << threadIdx.x % 32) - 1));
    if (threadIdx.x % 32 == 0) shared.tied[v * kWarps + warp] = __popc(votes);
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll 1  // rare, and registers are dear
    for (int i = 0; i < v * kWarps + warp; ++i) place[v] += shared.tied[i];
    if (ranks[v] == low && place[v] >= k - above) ranks[v] = 0;
  }
  return low;
}

// (maximum, sum of exponentials relative to it) of two sets; -inf has no exponentials, and must not make NaN of -inf - -inf.
__device__ __forceinline__ void merge_sums(float& largest, float& sum, float other_largest, float other_sum, float log2e) {
  const float both = fmaxf(largest, other_largest);
  const float base = both == -infinity() ? 0.0f : both;
  sum = sum * exp2_flushed((largest - base) * log2e) + other_sum * exp2_flushed((other_largest - base) * log2e);
  largest = both;
}

template <typename Logits>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) topk_partial_kernel(
    const typename Logits::Bits* __restrict__ logits,  // [N, V]
    const float* __restrict__ row_temperature,         // [N] or nullptr
    float* __restrict__ partial_values,                // [N, S, K]
    int32_t* __restrict__ partial_ids,                 // [N, S, K]
    float* __restrict__ partial_stats,                 // [N, S, 2]
    unsigned vocab,
    int k,
    float temperature,
    int64_t stride_logits_n) {
  constexpr int kElements = Logits::kElements;
  constexpr unsigned kStep = kThreads * kElements, kTile = kVectors * kStep;
  constexpr int kAppended = kVectors * kElements * kMaxK;  // at most, by a tile: that of max(K, kCrowd) lanes
  DPPO_SHARED(Candidates<kMaxK + kSlack + kAppended>, shared);
  static_assert(kCrowd <= kMaxK && kMaxK <= kThreads);

  const int64_t row_index = blockIdx.x;
  const unsigned split = blockIdx.y, splits = gridDim.y;
  const Scale scale(row_temperature, row_index, temperature);
  const Row<Logits> row(logits + row_index * stride_logits_n);
  const unsigned tiles = (row.head + vocab + (kTile - 1)) / kTile;
  const unsigned first = tiles * split / splits * kTile;  // at most 2^20 tiles and 32 splits
  const unsigned stop = min(tiles * (split + 1) / splits * kTile, row.head + vocab);

  if (threadIdx.x == 0) shared.held = 0;  // the barrier of the first tile comes before any use
  float largest = -infinity(), sum = 0.0f, lost = 0.0f;
  unsigned threshold = ordered(-infinity());  // K candidates with lower ids than all to come are at least this
  uint32_t next[kVectors][4];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) row.load(next[v], first + v * kStep + threadIdx.x * kElements, stop);

  for (unsigned tile = first; tile < stop; tile += kTile) {
    const unsigned position = tile + threadIdx.x * kElements;
    uint32_t words[kVectors][4];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int w = 0; w < 4; ++w) words[v][w] = next[v][w];
      if (tile + 2 * kTile <= stop) {
        row.load_whole(next[v], position + kTile + v * kStep);
      } else {
        row.load(next[v], position + kTile + v * kStep, stop);
      }
    }

    // The maximum of z is the z of the maximum: only it and the candidates are divided.
    unsigned ranks[kVectors], most = 0;
    float seen = largest;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float of_vector = Logits::largest(words[v]);
      seen = fmaxf(seen, of_vector);
      ranks[v] = scale.rank(of_vector);
      most = max(most, ranks[v]);
    }
    const float base = seen == -infinity() ? 0.0f : seen;
    float tile_sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        tile_sum += exp2_flushed((Logits::element(words[v], e) - base) * scale.log2e);
      }
    }
    // Compensated: equal terms round the same way every time, and hundreds of them would show.
    const float rescale = exp2_flushed((largest - base) * scale.log2e);
    sum *= rescale;
    const float term = tile_sum - lost * rescale, total = sum + term;
    lost = (total - sum) - term;
    sum = total;
    largest = seen;

    const int count = __syncthreads_count(most > threshold);
    if (count == 0) continue;
    unsigned least = threshold + 1;
    if (count > max(k, kCrowd)) least = threshold = sieve(shared, ranks, threshold, k);
    // Few elements are worth a division: of the vectors that take part, those that could pass.
    unsigned chosen = 0;
    const float lowest = scale.lowest(least);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (ranks[v] < least) continue;
#pragma unroll
      for (int e = 0; e < kElements; ++e) chosen |= Logits::element(words[v], e) >= lowest ? 1u << (v * kElements + e) : 0u;
    }
    for (; chosen != 0; chosen &= chosen - 1) {
      const int v = (__ffs(chosen) - 1) / kElements, e = (__ffs(chosen) - 1) % kElements;
      float logit = Logits::pick(words[0], e);
#pragma unroll
      for (int other = 1; other < kVectors; ++other) logit = v == other ? Logits::pick(words[other], e) : logit;
      const unsigned rank = scale.rank(logit);
      const int id = static_cast<int>(position + v * kStep + e - row.head);
      if (rank >= least) shared.keys[atomicAdd(&shared.held, 1)] = make_key(rank, id);
    }
    __syncthreads();
    if (shared.held > k + kSlack) threshold = flush(shared, k);
  }

#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other_largest = __shfl_xor_sync(kAllLanes, largest, distance);
    const float other_sum = __shfl_xor_sync(kAllLanes, sum, distance);
    merge_sums(largest, sum, other_largest, other_sum, scale.log2e);
  }
  if (threadIdx.x % 32 == 0) {
    shared.warp_max[threadIdx.x / 32] = largest;
    shared.warp_sum[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  flush(shared, k);  // its barrier is also that of warp_max and warp_sum
  const int64_t partial = row_index * splits + split;
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) {
      merge_sums(largest, sum, shared.warp_max[warp], shared.warp_sum[warp], scale.log2e);
    }
    partial_stats[2 * partial] = largest;
    partial_stats[2 * partial + 1] = sum;
  }
  __syncthreads();
  const int place = threadIdx.x;
  if (place < k) {
    const bool exists = place < shared.held;
    const Key key = shared.best[place];
    partial_values[partial * k + place] = exists ? key_z(key) : -infinity();
    partial_ids[partial * k + place] = exists ? key_id(key) : -1;
  }
}

// How many candidates of S sorted lists can be above the floor of the merge, K and S at their largest (see there).
constexpr int count_survivors() {
  int count = 1;
  for (int j = 1; j <= kMaxSplits; ++j) count += (kMaxK + j - 1) / j - 1;
  return count;
}
constexpr int kMaxSurvivors = count_survivors();

struct Merge {
  Key probes[kMaxSplits * kMaxSplits];
  Key floors[kMaxSplits];
  Key survivors[kMaxSurvivors];
  Key best[kMaxK];
  int held, inside;
  double lse;
};

template <typename Logits>
__global__ void __launch_bounds__(kThreads) topk_merge_kernel(
    const typename Logits::Bits* __restrict__ logits,  // [N, V]
    const int64_t* __restrict__ sampled_ids,           // [N]
    const float* __restrict__ row_temperature,         // [N] or nullptr
    const float* __restrict__ partial_values,          // [N, S, K]
    const int32_t* __restrict__ partial_ids,           // [N, S, K]
    const float* __restrict__ partial_stats,           // [N, S, 2]
    int64_t* __restrict__ ids,                         // [N, K+1]
    float* __restrict__ logprobs,                      // [N, K+1]
    float* __restrict__ sampled_logprobs,              // [N]
    float* __restrict__ lse_out,                       // [N]
    unsigned vocab,
    int k,
    int splits,
    float temperature,
    int64_t stride_logits_n) {
  DPPO_SHARED(Merge, shared);

  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x;
  const Scale scale(row_temperature, row, temperature);
  const auto key_at = [&](int list, int place) -> Key {
    const int64_t at = (row * splits + list) * k + place;
    const int id = partial_ids[at];
    return id < 0 ? 0 : make_key(ordered(partial_values[at]), id);
  };

  if (thread == 0) shared.held = 0, shared.inside = 0;
  if (thread < 32) {
    const bool exists = thread < splits;
    const float largest = exists ? partial_stats[2 * (row * splits + thread)] : -infinity();
    float all = largest;
    for (int distance = 16; distance > 0; distance /= 2) all = fmaxf(all, __shfl_xor_sync(kAllLanes, all, distance));
    const float base = all == -infinity() ? 0.0f : all;
    const float weight = exp2_flushed((largest - base) * scale.log2e);
    double sum = exists ? static_cast<double>(partial_stats[2 * (row * splits + thread) + 1]) * weight : 0.0;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    // In double: log-probs are differences of numbers that may be large.
    if (thread == 0) shared.lse = static_cast<double>(base) / scale.temperature + log(sum);
  }

  // S sorted lists hold up to S K candidates, too many to rank by counting. For any j, j lists whose first ceil(K / j) are
  // at least x hold K candidates that are: x, the j-th largest of the lists' elements at that place, is a floor. The largest
  // floor over j leaves at most ceil(K / j) - 1 candidates above it in the list with the j-th most of them.
  for (int i = thread; i < splits * splits; i += kThreads) {
    const int j = i / splits + 1;
    shared.probes[i] = key_at(i % splits, (k + j - 1) / j - 1);
  }
  __syncthreads();
  for (int i = thread; i < splits * splits; i += kThreads) {
    const int j = i / splits, list = i % splits;
    const Key probe = shared.probes[i];
    int rank = 0;
    for (int other = 0; other < splits; ++other) {
      const Key key = shared.probes[j * splits + other];
      rank += key > probe || (key == probe && other < list);  // equal: both are none
    }
    if (rank == j) shared.floors[j] = probe;
  }
  __syncthreads();
  Key floor = 1;  // none is no candidate
  for (int j = 0; j < splits; ++j) floor = max(floor, shared.floors[j]);
  for (int i = thread; i < splits * k; i += kThreads) {
    const Key key = key_at(i / k, i % k);
    if (key >= floor) shared.survivors[atomicAdd(&shared.held, 1)] = key;
  }
  __syncthreads();
  const int n = shared.held, found = min(n, k);
  for (int i = thread; i < n; i += kThreads) {
    const Key key = shared.survivors[i];
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += shared.survivors[j] > key;
    if (rank < k) shared.best[rank] = key;
  }
  __syncthreads();

  const int64_t sampled = sampled_ids[row], column = row * (k + 1);
  const double lse = shared.lse;
  if (thread < found) {
    const int id = key_id(shared.best[thread]);
    ids[column + thread] = id;
    logprobs[column + thread] = static_cast<float>(key_z(shared.best[thread]) - lse);
    if (id == sampled) shared.inside = 1;
  }
  if (found < k) {
    // All other logits are -inf. Fewer than K + K ids are looked at, so a thread each is enough.
    int lower = 0;
    bool listed = false;
    for (int i = 0; i < found; ++i) {
      lower += key_id(shared.best[i]) < thread;
      listed |= key_id(shared.best[i]) == thread;
    }
    const int place = found + thread - lower;
    if (!listed && place < k) {
      ids[column + place] = thread;
      logprobs[column + place] = -infinity();
      if (thread == sampled) shared.inside = 1;
    }
  }
  __syncthreads();
  if (thread == 0) {
    float sampled_logprob = __uint_as_float(0x7fc00000u);
    if (sampled >= 0 && sampled < vocab) {
      const uint32_t words[4] = {logits[row * stride_logits_n + sampled], 0, 0, 0};
      sampled_logprob = static_cast<float>(scale(Logits::element(words, 0)) - lse);
    }
    sampled_logprobs[row] = sampled_logprob;
    ids[column + k] = shared.inside ? -1 : sampled;
    logprobs[column + k] = shared.inside ? 0.0f : sampled_logprob;
    lse_out[row] = static_cast<float>(lse);
  }
}

template <typename Logits>
void launch(const TopkCall& call, cudaStream_t stream) {
  const auto* bits = static_cast<const typename Logits::Bits*>(call.logits);
  const auto columns = static_cast<unsigned>(call.vocab), n = static_cast<unsigned>(call.n);
  const dim3 segments(n, call.splits), rows(n), block(kThreads);
  DPPO_LAUNCH(
      topk_partial_kernel<Logits>, segments, block, stream, bits, call.row_temperature, call.partial_values, call.partial_ids,
      call.partial_stats, columns, call.k, call.temperature, call.stride_logits_n);
  DPPO_LAUNCH(
      topk_merge_kernel<Logits>, rows, block, stream, bits, call.sampled_ids, call.row_temperature, call.partial_values,
      call.partial_ids, call.partial_stats, call.ids, call.logprobs, call.sampled_logprobs, call.lse, columns, call.k,
      call.splits, call.temperature, call.stride_logits_n);
}

}  // namespace

const char* topk_logprobs_launch(const TopkCall& call, cudaStream_t stream) {
  constexpr int64_t kMaxInt = 2147483647;
  if (call.n < 0 || call.n > kMaxInt) return "topk_logprobs: the number of rows must be in [0, 2^31)";
  if (call.vocab < 1 || call.vocab > kMaxInt) return "topk_logprobs: the vocabulary must be in [1, 2^31)";
  if (call.k < 1 || call.k > kMaxK || call.k > call.vocab) return "topk_logprobs: k must be in [1, min(V, 128)]";
  if (call.splits < 1 || call.splits > kMaxSplits) return "topk_logprobs: splits must be in [1, 32]";
  if (call.n == 0) return nullptr;
  switch (call.dtype) {
    case kFloat32:
      launch<Float32>(call, stream);
      break;
    case kBFloat16:
      launch<BFloat16>(call, stream);
      break;
    case kFloat16:
      launch<Float16>(call, stream);
      break;
    default:
      return "topk_logprobs: unknown dtype";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dppo
