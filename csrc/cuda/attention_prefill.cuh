// Prefill and mixed attention for every head_dim, dtype and place: blocks of 64 packed query rows
// (a warp has 16) walk the keys that any of them sees, 64 at a time, straight from the pages.
// attention_sm90.cuh is the fast one for what it supports.
#pragma once

#include "attention_tile.cuh"

namespace torch_pd {

// Work of a prefill kernel: (sequence, tile of rows), heaviest first, made on the device.
struct PrefillArgs {
  AttentionArgs a;
  int32_t tile_rows, max_items;
  int2* items;        // [max_items]
  int32_t* counters;  // [2]: number of items, next item of a persistent kernel
};

// Keys that the rows of one tile see: [first, stop).
struct KeyRange {
  int32_t first, stop;
};
__device__ __forceinline__ KeyRange key_range(const AttentionArgs& a, const Sequence& q, int row0,
                                              int row1) {
  const int32_t low = a.window > 0 ? q.position(row0 / a.group) - a.window + 1 : 0;
  return {max(0, low), max(0, q.position((row1 - 1) / a.group) + 1)};
}

constexpr int kPlanThreads = 1024;
constexpr int kPlanBuckets = 256;
constexpr int kPlanShared = kPlanThreads * static_cast<int>(sizeof(Sequence)) +
                            (kPlanBuckets + 1) * static_cast<int>(sizeof(int32_t));

// One block: a bucket sort of all tiles by the number of keys, most first, so that the last ones to
// start are short. Items are independent: their order within a bucket changes no result.
__global__ void __launch_bounds__(kPlanThreads)
    prefill_plan(const __grid_constant__ PrefillArgs p) {
  extern __shared__ __align__(128) char shared[];
  Sequence* list = reinterpret_cast<Sequence*>(shared);
  int32_t* counts = reinterpret_cast<int32_t*>(list + kPlanThreads);
  int32_t* top = counts + kPlanBuckets;
  const AttentionArgs& a = p.a;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  if (thread < kPlanBuckets) counts[thread] = 0;
  if (thread == 0) *top = 1;
  __syncthreads();
  int32_t most = 1;
  for (int s = thread; s < a.num_seqs; s += kPlanThreads) {
    const Sequence q = read_sequence(a, s, true);
    if (q.q_len > 0) most = max(most, q.len - q.begin);
  }
  atomicMax(top, most);
  for (int pass = 0; pass < 2; ++pass) {
    for (int base = 0; base < a.num_seqs; base += kPlanThreads) {
      __syncthreads();
      if (base + thread < a.num_seqs) list[thread] = read_sequence(a, base + thread, false);
      __syncthreads();
      for (int j = warp; j < min(kPlanThreads, a.num_seqs - base); j += kPlanThreads / 32) {
        const Sequence q = list[j];
        const int rows = q.q_len * a.group;
        for (int i = lane; i * p.tile_rows < rows; i += 32) {
          const int row0 = i * p.tile_rows;
          const KeyRange keys = key_range(a, q, row0, min(row0 + p.tile_rows, rows));
          const int64_t share =
              static_cast<int64_t>(max(0, keys.stop - keys.first)) * (kPlanBuckets - 1) / *top;
          const int at = atomicAdd(&counts[kPlanBuckets - 1 - static_cast<int>(share)], 1);
          // Query ranges that overlap (bad input) could be more than there is room for.
          if (pass == 1 && at < p.max_items) p.items[at] = make_int2(base + j, i);
        }
      }
    }
    __syncthreads();
    if (pass == 0 && thread == 0) {
      int32_t sum = 0;
      for (int b = 0; b < kPlanBuckets; ++b) {
        const int32_t count = counts[b];
        counts[b] = sum;
        sum += count;
      }
      p.counters[0] = min(sum, p.max_items);
      p.counters[1] = 0;
    }
  }
}

template <typename T, int D, bool FP8>
struct PrefillTraits : TileTraits<T, D, FP8> {
  using Tile = TileTraits<T, D, FP8>;
  static constexpr int kWarps = 4;
  static constexpr int kRows = kWarps * 16;
  static constexpr int kKeys = kWarps * kTileKeys;  // of a stage: each warp loads one tile
  static constexpr int kStageBytes =
      kWarps * (2 * Tile::kTileBytes + (FP8 ? 2 * kTileKeys * 4 : 0));
  static constexpr int kShared = 2 * kStageBytes;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kWarps * 32)
    prefill_kernel(const __grid_constant__ PrefillArgs p) {
  extern __shared__ __align__(128) char shared[];
  const AttentionArgs& a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int item = blockIdx.x / a.num_kv_heads, head = blockIdx.x - item * a.num_kv_heads;
  if (item >= p.counters[0]) return;
  const int seq = p.items[item].x, row0 = p.items[item].y * Traits::kRows;
  const Sequence q = read_sequence(a, seq, false);
  const int rows = q.q_len * a.group;
  const KeyRange keys = key_range(a, q, row0, min(row0 + Traits::kRows, rows));
  const int first_row = row0 + warp * 16;
  const bool works = first_row < rows;
  const KeyRange mine = key_range(a, q, first_row, max(first_row + 1, min(first_row + 16, rows)));

  const uint32_t memory = ptx::smem_address(shared);
  constexpr int kScales = Traits::kWarps * 2 * Traits::kTileBytes;  // offset in a stage
  const int32_t first_step = keys.first / Traits::kKeys;
  const int32_t stop_step = (keys.stop + Traits::kKeys - 1) / Traits::kKeys;
  const auto load = [&](int32_t step) {
    const int32_t key = step * Traits::kKeys + warp * kTileKeys;
    const int32_t entry = key < q.len ? a.tables[seq * a.table_stride + (key >> a.block_shift)] : 0;
    const int offset = step % 2 * Traits::kStageBytes;
    const uint32_t to = memory + offset;
    const uint32_t scales = to + kScales + warp * kTileKeys * 4;
    load_keys<Traits>(a, q, head, key, entry, to + warp * Traits::kTileBytes,
                      to + (Traits::kWarps + warp) * Traits::kTileBytes, scales,
                      scales + Traits::kKeys * 4, lane, head == 0);
    ptx::cp_async_commit();
  };

  RowTile<Traits> tile;
  tile.lane = lane;
  if (first_step < stop_step) load(first_step);
  if (works) tile.begin(a, q, head, first_row);
#pragma unroll 1
  for (int32_t step = first_step; step < stop_step; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has landed, the other one is free
    if (step + 1 < stop_step) load(step + 1);
    if (!works) continue;
    const int offset = step % 2 * Traits::kStageBytes;
    const float* scales = reinterpret_cast<const float*>(shared + offset + kScales);
#pragma unroll 1
    for (int t = 0; t < Traits::kWarps; ++t) {
      const int32_t key = step * Traits::kKeys + t * kTileKeys;
      if (key >= mine.stop || key + kTileKeys <= mine.first) continue;
      const uint32_t at = memory + offset + t * Traits::kTileBytes;
      tile.add_keys(a, key, at, at + Traits::kWarps * Traits::kTileBytes, scales + t * kTileKeys,
                    scales + Traits::kKeys + t * kTileKeys);
    }
  }
  if (!works) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = ptx::quad_sum(tile.l[h]);
    const int row = first_row + lane / 4 + 8 * h;
    if (row < rows) tile.write(a, q, head, row, h, sum);
  }
}

}  // namespace torch_pd
