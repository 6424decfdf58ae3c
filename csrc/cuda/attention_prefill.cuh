// Prefill and mixed attention for every head_dim, dtype and place: blocks of 64 packed query rows
// (a warp has 16) walk the keys that any of them sees, 64 at a time, straight from the pages.
// attention_sm90.cuh is the fast one for what it supports.
#pragma once

#include "attention_tile.cuh"

namespace torch_pd {

// A tile of rows of one sequence, for all KV heads, with what a kernel must know of the sequence:
// one read instead of a chain of them.
struct alignas(16) PrefillItem {
  int32_t seq, tile;
  Sequence q;
  int32_t unused[2];
};

// Work of a prefill kernel, heaviest first, made on the device.
struct PrefillArgs {
  AttentionArgs a;
  int32_t tile_rows, max_items;
  PrefillItem* items;  // [max_items]
  int32_t* count;      // [1]
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

template <typename T, int D, int STORED>
struct PrefillTraits : TileTraits<T, D, STORED, 16> {
  using Tile = TileTraits<T, D, STORED, 16>;
  static constexpr int kWarps = 4;
  static constexpr int kBlockRows = kWarps * 16;
  static constexpr int kKeys = kWarps * kTileKeys;  // of a stage: each warp loads one tile
  static constexpr int kStageBytes =
      kWarps * (2 * Tile::kTileBytes + (STORED ? 2 * kTileKeys * 4 : 0));
  static constexpr int kShared = 2 * kStageBytes;
  static_assert(kStageBytes % 128 == 0);
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kWarps * 32, Traits::D > 128 ? 1 : 3)
    prefill_kernel(const __grid_constant__ PrefillArgs p) {
  extern __shared__ __align__(128) char shared[];
  const AttentionArgs& a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int item = blockIdx.x / a.num_kv_heads, head = blockIdx.x - item * a.num_kv_heads;
  if (item >= *p.count) return;
  const PrefillItem work = p.items[item];
  const int seq = work.seq, row0 = work.tile * Traits::kBlockRows;
  const Sequence q = work.q;
  const int rows = q.q_len * a.group;
  const KeyRange keys = key_range(a, q, row0, min(row0 + Traits::kBlockRows, rows));
  const int first_row = row0 + warp * 16;
  const bool works = first_row < rows;
  const KeyRange mine = key_range(a, q, first_row, max(first_row + 1, min(first_row + 16, rows)));

  const uint32_t memory = ptx::smem_address(shared);
  constexpr int kScales = Traits::kWarps * 2 * Traits::kTileBytes;  // offset in a stage
  const int32_t first_step = keys.first / Traits::kKeys;
  const int32_t stop_step = (keys.stop + Traits::kKeys - 1) / Traits::kKeys;
  const KeyLoader<Traits> loader(a, head, lane, head == 0, Traits::kKeys * 4);
  const auto load = [&](int32_t step) {
    const int32_t key = step * Traits::kKeys + warp * kTileKeys;
    const int32_t entry = key < q.len ? a.tables[seq * a.table_stride + (key >> a.block_shift)] : 0;
    const int offset = step % 2 * Traits::kStageBytes;
    const uint32_t to = memory + offset;
    const uint32_t scales = to + kScales + warp * kTileKeys * 4;
    loader.load(q, key, entry, to + warp * Traits::kTileBytes,
                to + (Traits::kWarps + warp) * Traits::kTileBytes, scales);
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
  if (works) tile.write(a, q, head, first_row);
}

}  // namespace torch_pd
