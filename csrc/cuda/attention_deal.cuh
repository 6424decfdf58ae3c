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
  int32_t row_tiles;    // of Traits::kRows packed rows: cover max_rows
  int32_t padded_rows;  // row_tiles * Traits::kRows
  int32_t max_slices;   // as many as there is room for
  Cut* cuts;            // [max_slices] written by the slice's first block
  float* values;        // [max_slices, 2, num_kv_heads, padded_rows, D] sums of p * v
  float2* sums;         // [max_slices, 2, num_kv_heads, padded_rows] maximum, sum of p
  float* parked;  // [blocks, kWarps, kRows, kSumPitch] what a warp has before its next sequence
};

template <typename T, int D, int STORED, int ROWS>
struct DecodeTraits : TileTraits<T, D, STORED, ROWS> {
  using Tile = TileTraits<T, D, STORED, ROWS>;
  static constexpr int kKeys = kTileKeys;  // of a step
  static constexpr int kStageBytes = 2 * Tile::kTileBytes + (STORED ? 2 * kKeys * 4 : 0);
  // A warp's sums of its last sequence take the place of its ring; the pitch avoids bank conflicts.
  static constexpr int kSumPitch = D + 8;
  static constexpr int kWarps = 4;
  static constexpr int kBlocks = D > 128 ? 1 : 2;  // on a multiprocessor at once
  // Of 228 KiB, 1 KiB a block is the system's and 1,280 bytes are those of Team.
  static constexpr int kFit = (233472 / kBlocks - 2304) / (kWarps * kStageBytes);
  // As many as bring a multiprocessor 64 KiB ahead: with more the warps that read a page's other
  // heads get further apart, and memory gives less (measured: 5% with bytes).
  static constexpr int kAhead = (65536 / (kWarps * kBlocks) + kStageBytes - 1) / kStageBytes;
  static constexpr int kWanted = kAhead < 2 ? 3 : kAhead + 1;
  static constexpr int kStages = kFit < kWanted ? kFit : kWanted;
  static constexpr int kRingBytes = kStages * kStageBytes;  // of a warp
  static constexpr int kShared = kWarps * kRingBytes;
  static constexpr int kLeastSteps = kWarps;  // of a slice: one a warp
  static_assert(kStages >= 3 && kRingBytes >= ROWS * kSumPitch * 4 && kStageBytes % 128 == 0);
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
  return ((slice * 2 + which) * d.a.num_kv_heads + head) * d.padded_rows + row;
}

template <typename Traits>
__device__ __forceinline__ int32_t num_steps(const Sequence& q) {
  if (q.q_len == 0) return 0;
  return (q.len + Traits::kKeys - 1) / Traits::kKeys - q.begin / Traits::kKeys;
}

// Walks through a warp's part of a slice, sequence by sequence.
template <typename Traits>
struct Cursor {
  int32_t seq;
  int32_t begin, stop;  // steps of this sequence inside the part
  int32_t step;         // the next one
  int64_t left;         // steps of the part after this sequence
  Sequence q;

  __device__ __forceinline__ int32_t first_step() const { return q.begin / Traits::kKeys; }

  // Enters sequence `seq` at its step number `skip`; passes over sequences without a row of ours.
  __device__ __forceinline__ void enter(const AttentionArgs& a, int first_row, int32_t skip) {
    begin = stop = step = 0;
    while (left > 0) {
      q = read_sequence(a, seq, false);
      const int32_t steps = num_steps<Traits>(q) - skip;
      const int32_t mine = static_cast<int32_t>(min(static_cast<int64_t>(steps), left));
      left -= mine;
      if (mine > 0 && q.q_len * a.group > first_row) {
        begin = step = first_step() + skip;
        stop = begin + mine;
        return;
      }
      ++seq, skip = 0;
    }
  }
  __device__ __forceinline__ bool next(const AttentionArgs& a, int first_row) {
    if (left == 0) return false;
    ++seq;
    enter(a, first_row, 0);
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
