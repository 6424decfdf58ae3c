// How decode attention's work is dealt out: slices of all sequences' keys, computed by every block
// from seq_lens (attention_decode.cuh).
#pragma once

#include "attention_tile.cuh"

namespace torch_pd {

// A sequence that several slices worked on: the first and last of them, first query, queries. Each
// slice but the sequence's first holds it; queries 0: the slice starts with a new sequence.
struct __align__(16) Cut {
  int32_t first, last, q_start, q_len;
};

struct DecodeArgs {
  AttentionArgs a;
  int32_t row_tiles;   // tiles of 16 packed rows: covers max_rows
  int32_t max_slices;  // as many as there is room for
  Cut* cuts;           // [max_slices] written by the slice's first block
  float* values;       // [max_slices, 2, num_kv_heads, row_tiles * 16, D] sums of p * v
  float2* sums;        // [max_slices, 2, num_kv_heads, row_tiles * 16] maximum, sum of p
};

template <typename T, int D, int STORED>
struct DecodeTraits : TileTraits<T, D, STORED> {
  using Tile = TileTraits<T, D, STORED>;
  // A step is as many bytes either way: with float8, the arithmetic on one tile at a time would
  // take nearly as long as its bytes. Wide heads have no registers for two.
  static constexpr int kTiles = STORED && D <= 128 ? 2 : 1;
  static constexpr int kKeys = kTiles * kTileKeys;
  static constexpr int kHalfBytes = kTiles * Tile::kTileBytes;  // K or V
  static constexpr int kLoadBytes = 2 * kHalfBytes + (STORED ? 2 * kKeys * 4 : 0);
  // A warp's sums of one sequence take the place of a stage; the pitch avoids bank conflicts.
  static constexpr int kSumPitch = D + 8;
  static constexpr int kSumBytes = 16 * kSumPitch * 4;
  static constexpr int kStageBytes = kLoadBytes > kSumBytes ? kLoadBytes : kSumBytes;
  static constexpr int kWarps = 4;
  static constexpr int kBlocks = D > 128 ? 1 : 2;  // on a multiprocessor at once
  static constexpr int kFit = 224 * 1024 / (kBlocks * kWarps * kStageBytes);
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static constexpr int kRingBytes = kStages * kStageBytes;  // of a warp
  static constexpr int kShared = kWarps * kRingBytes;
  static constexpr int kLeastSteps = kWarps;  // of a slice: one a warp
  static_assert(kStages >= 3);
};

// How `steps` are dealt out: to as many slices as fit, of equal length.
struct Deal {
  int64_t steps;
  int32_t slices;

  // At most `most` slices, each at least `least` steps long.
  __host__ __device__ Deal(int64_t steps, int32_t most, int32_t least) : steps(steps) {
    const int64_t fit = (steps + least - 1) / least;
    slices = fit < 1 ? 1 : fit < most ? static_cast<int32_t>(fit) : most;
  }
  // First step of slice i, and the slice that step x is in.
  __device__ __forceinline__ int64_t start(int64_t i) const { return i * steps / slices; }
  __device__ __forceinline__ int32_t slice_of(int64_t x) const {
    return static_cast<int32_t>(((x + 1) * slices - 1) / steps);
  }
};

__device__ __forceinline__ int64_t partial_row(const DecodeArgs& d, int64_t slice, int which,
                                               int head, int row) {
  return ((slice * 2 + which) * d.a.num_kv_heads + head) * (d.row_tiles * 16) + row;
}

template <typename Traits>
__device__ __forceinline__ int32_t num_steps(const Sequence& q) {
  if (q.q_len == 0) return 0;
  return (q.len + Traits::kKeys - 1) / Traits::kKeys - q.begin / Traits::kKeys;
}

// Walks through a slice, sequence by sequence.
template <typename Traits>
struct Cursor {
  int32_t seq;
  int32_t begin, stop;  // steps of this sequence inside the slice
  int32_t done;         // steps of the slice before `begin`: warp done % kWarps has that one
  int32_t step;         // this warp's next one
  int64_t left;         // steps of the slice after this sequence
  Sequence q;

  __device__ __forceinline__ int32_t first_step() const { return q.begin / Traits::kKeys; }

  // Enters sequence `seq` at its step number `skip`; passes over sequences without a row of ours.
  __device__ __forceinline__ void enter(const AttentionArgs& a, int first_row, int warp,
                                        int32_t skip) {
    while (true) {
      q = read_sequence(a, seq, false);
      const int32_t steps = num_steps<Traits>(q) - skip;
      const int32_t mine = static_cast<int32_t>(min(static_cast<int64_t>(steps), left));
      left -= mine;
      begin = first_step() + skip;
      stop = begin + mine;
      step = begin + ((warp - done) & (Traits::kWarps - 1));
      if (mine > 0 && q.q_len * a.group > first_row) return;
      step = begin = stop;
      if (left == 0) return;
      ++seq, skip = 0;
    }
  }
  __device__ __forceinline__ bool next(const AttentionArgs& a, int first_row, int warp) {
    if (left == 0) return false;
    done += stop - begin;
    ++seq;
    enter(a, first_row, warp, 0);
    return begin < stop;
  }
};

// Prefix sums of the sequences' steps into shared memory. Returns the number of all steps.
template <typename Traits>
__device__ __forceinline__ int64_t plan_slices(const DecodeArgs& d, int32_t* before,
                                               int32_t* warp_sums) {
  const AttentionArgs& a = d.a;
  constexpr int kThreads = Traits::kWarps * 32;
  const int each = (a.num_seqs + kThreads - 1) / kThreads;
  const int from = min(static_cast<int>(threadIdx.x) * each, a.num_seqs);
  const int to = min(from + each, a.num_seqs);
  int32_t mine = 0;
  for (int s = from; s < to; ++s) {
    mine += num_steps<Traits>(read_sequence(a, s, blockIdx.x == 0));
    before[s + 1] = mine;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t below = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int32_t offset = sum - mine, total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) offset += warp_sums[w];
    total += warp_sums[w];
  }
  for (int s = from; s < to; ++s) before[s + 1] += offset;
  if (threadIdx.x == 0) before[0] = 0;
  __syncthreads();
  return total;
}

}  // namespace torch_pd
