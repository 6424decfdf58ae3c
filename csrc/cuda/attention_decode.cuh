// Decode attention: few query rows a sequence, so the time is that of reading K and V once.
//
// A worker is one warp. It owns one KV head, one tile of 16 packed query rows and one slice of all
// sequences' keys, which it streams in steps of one or two tiles through its own ring of shared
// memory: no two warps ever wait for each other. The slices cut the concatenation of all
// sequences' steps into equal parts, computed by every block from seq_lens, so skewed lengths
// balance and nothing is read on the host. The heads of a slice are neighbouring warps: together
// they read whole tokens, all heads, of a page. A sequence inside one slice is finished there; one
// that is cut leaves float32 partial results, at most two per slice, that decode_combine adds up in
// the order of the slices: equal input gives equal bits.
#pragma once

#include "attention_tile.cuh"

namespace torch_pd {

constexpr int kMinSliceKeys = 64;  // below this a slice costs more to combine than it saves

// A sequence that several slices worked on: the first and last of them, first query, queries. Each
// slice but the sequence's first holds it; queries 0: the slice starts with a new sequence.
struct __align__(16) Cut {
  int32_t first, last, q_start, q_len;
};

struct DecodeArgs {
  AttentionArgs a;
  int32_t row_tiles;   // tiles of 16 packed rows: covers max_rows
  int32_t max_slices;  // as many as there are warps for
  Cut* cuts;           // [max_slices] written by the slice's first worker
  float* values;       // [max_slices, 2, num_kv_heads, row_tiles * 16, D] sums of p * v
  float2* sums;        // [max_slices, 2, num_kv_heads, row_tiles * 16] maximum, sum of p
};

template <typename T, int D, bool FP8>
struct DecodeTraits : TileTraits<T, D, FP8> {
  using Tile = TileTraits<T, D, FP8>;
  // A step is as many bytes either way: with float8, the arithmetic on one tile at a time would
  // take nearly as long as its bytes. Wide heads have no registers for two.
  static constexpr int kTiles = FP8 && D <= 128 ? 2 : 1;
  static constexpr int kKeys = kTiles * kTileKeys;
  static constexpr int kHalfBytes = kTiles * Tile::kTileBytes;  // K or V
  static constexpr int kStageBytes = 2 * kHalfBytes + (FP8 ? 2 * kKeys * 4 : 0);
  static constexpr int kWarps = D > 128 ? 4 : 8;
  static constexpr int kFit = 224 * 1024 / (kWarps * kStageBytes);
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static constexpr int kShared = kWarps * kStages * kStageBytes;
  static_assert(kStages >= 3);
};

template <typename Traits>
__device__ __forceinline__ int32_t num_slices(int32_t max_slices, int64_t steps) {
  constexpr int kLeast = kMinSliceKeys / Traits::kKeys;
  return static_cast<int32_t>(
      min(static_cast<int64_t>(max_slices), max(int64_t{1}, (steps + kLeast - 1) / kLeast)));
}
// First step of slice i, and the slice that step x is in.
__device__ __forceinline__ int64_t slice_start(int64_t steps, int32_t slices, int64_t i) {
  return i * steps / slices;
}
__device__ __forceinline__ int32_t slice_of(int64_t steps, int32_t slices, int64_t x) {
  return static_cast<int32_t>(((x + 1) * slices - 1) / steps);
}
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
  int32_t step, stop;  // of this sequence, inside the slice
  int64_t left;        // steps of the slice after this sequence
  Sequence q;

  __device__ __forceinline__ int32_t first_step() const { return q.begin / Traits::kKeys; }

  // Enters sequence `seq` at its step number `skip`; passes over sequences without a row of ours.
  __device__ __forceinline__ void enter(const AttentionArgs& a, int first_row, int32_t skip) {
    while (true) {
      q = read_sequence(a, seq, false);
      const int32_t steps = num_steps<Traits>(q) - skip;
      const int32_t mine = static_cast<int32_t>(min(static_cast<int64_t>(steps), left));
      left -= mine;
      step = first_step() + skip;
      stop = step + mine;
      if (mine > 0 && q.q_len * a.group > first_row) return;
      step = stop;
      if (left == 0) return;
      ++seq, skip = 0;
    }
  }
};

template <typename Traits>
struct DecodeWorker {
  static constexpr int D = Traits::D;

  const DecodeArgs& d;
  const AttentionArgs& a;
  const int lane, head, first_row;
  const bool reports;
  char* const memory;   // of this warp: kStages of K, V, k_scale, v_scale
  const uint32_t ring;  // its shared-memory address
  RowTile<Traits> rows;

  // Block table entries of 32 tiles, one a lane, and of the next 32.
  struct Entries {
    int32_t base, now, next;
  };
  __device__ __forceinline__ int32_t read_entry(const Cursor<Traits>& c, int32_t tile) const {
    const int64_t key = static_cast<int64_t>(tile) * kTileKeys;
    if (tile >= c.stop * Traits::kTiles || key >= c.q.len) return 0;
    return a.tables[c.seq * a.table_stride + (key >> a.block_shift)];
  }
  __device__ __forceinline__ void fill(Entries& e, const Cursor<Traits>& c) const {
    e.base = c.step * Traits::kTiles;
    e.now = read_entry(c, e.base + lane);
    e.next = read_entry(c, e.base + 32 + lane);
  }
  __device__ __forceinline__ void load_step(Entries& e, const Cursor<Traits>& c, int stage) const {
    if (c.step * Traits::kTiles - e.base == 32) {
      e.base += 32;
      e.now = e.next;
      e.next = read_entry(c, e.base + 32 + lane);
    }
    const uint32_t keys = ring + stage * Traits::kStageBytes, values = keys + Traits::kHalfBytes;
    const uint32_t k_scales = values + Traits::kHalfBytes, v_scales = k_scales + Traits::kKeys * 4;
#pragma unroll
    for (int t = 0; t < Traits::kTiles; ++t) {
      const int tile = c.step * Traits::kTiles + t, at = t * Traits::kTileBytes;
      load_keys<Traits>(a, c.q, head, tile * kTileKeys, __shfl_sync(~0u, e.now, tile - e.base),
                        keys + at, values + at, k_scales + t * kTileKeys * 4,
                        v_scales + t * kTileKeys * 4, lane, reports);
    }
  }

  // partial: -1 if the sequence lies in this slice whole, else which of its two partial results.
  __device__ __forceinline__ void end_sequence(const Sequence& q, int64_t slice, int partial) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = ptx::quad_sum(rows.l[h]);
      const int row = first_row + lane / 4 + 8 * h;
      if (row >= q.q_len * a.group) continue;
      if (partial < 0) {
        rows.write(a, q, head, row, h, sum);
        continue;
      }
      const int64_t at = partial_row(d, slice, partial, head, row);
      float* values = d.values + at * D;
      const float unit = Traits::FP8 ? rows.v_unit : 1.0f;
      rows.each_pair(h, [&](int column, float x, float y) {
        *reinterpret_cast<float2*>(values + column) = make_float2(x * unit, y * unit);
      });
      if (lane % 4 == 0) d.sums[at] = make_float2(rows.m[h], sum);
    }
  }

  __device__ __forceinline__ void run(int64_t slice, Cursor<Traits> loading) {
    Cursor<Traits> at = loading;
    Entries entries;
    fill(entries, loading);
    int load_stage = 0, stage = 0;
    const auto load_next = [&] {
      if (loading.step == loading.stop && loading.left > 0) {
        ++loading.seq;
        loading.enter(a, first_row, 0);
        fill(entries, loading);
      }
      if (loading.step < loading.stop) {
        load_step(entries, loading, load_stage);
        ++loading.step;
        load_stage = load_stage + 1 == Traits::kStages ? 0 : load_stage + 1;
      }
      ptx::cp_async_commit();  // empty at the end: the waits below count groups
    };
#pragma unroll 1
    for (int i = 0; i < Traits::kStages - 1; ++i) load_next();
    while (true) {
      if (at.step == at.stop) {
        if (at.left == 0) return;
        ++at.seq;
        at.enter(a, first_row, 0);
        if (at.step == at.stop) return;
      }
      const bool from_start = at.step == at.first_step();
      rows.begin(a, at.q, head, first_row);
#pragma unroll 1
      for (; at.step < at.stop; ++at.step) {
        ptx::cp_async_wait<Traits::kStages - 2>();
        __syncwarp();  // every lane's part of the step has landed; the stage before is free
        load_next();
        const int at_stage = stage * Traits::kStageBytes;
        const float* scales =
            reinterpret_cast<const float*>(memory + at_stage + 2 * Traits::kHalfBytes);
        rows.template add_keys<Traits::kTiles>(a, at.step * Traits::kKeys, ring + at_stage,
                                               ring + at_stage + Traits::kHalfBytes, scales,
                                               scales + Traits::kKeys);
        stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
      }
      const bool to_end = at.stop - at.first_step() == num_steps<Traits>(at.q);
      end_sequence(at.q, slice, !from_start ? 0 : to_end ? -1 : 1);
    }
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

// Brings lengths and block tables to the L2 cache while the kernel before may still write them: a
// line each for the first threads of the grid.
__device__ __forceinline__ void prefetch_tables(const AttentionArgs& a, int thread) {
  constexpr int kLine = 128 / sizeof(int32_t);
  const int64_t at = static_cast<int64_t>(thread) * kLine;
  if (at < a.num_seqs) ptx::prefetch_l2(a.seq_lens + at), ptx::prefetch_l2(a.query_start + at);
  if (at < (a.num_seqs - 1) * a.table_stride + a.max_pages) ptx::prefetch_l2(a.tables + at);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kWarps * 32, 1)
    decode_kernel(const __grid_constant__ DecodeArgs d) {
  extern __shared__ __align__(128) char shared[];
  const AttentionArgs& a = d.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* warp_sums = reinterpret_cast<int32_t*>(shared);
  int32_t* before = warp_sums + 32;  // the ring's memory, not in use yet
  prefetch_tables(a, blockIdx.x * (Traits::kWarps * 32) + threadIdx.x);
  ptx::grid_dependency_wait();
  const int64_t steps = plan_slices<Traits>(d, before, warp_sums);
  ptx::launch_dependents();

  const int worker = blockIdx.x * Traits::kWarps + warp;
  const int parts = a.num_kv_heads * d.row_tiles;
  const int slice = worker / parts, part = worker - slice * parts;
  const int32_t slices = num_slices<Traits>(d.max_slices, steps);
  Cursor<Traits> cursor;
  int32_t skip = 0;
  const bool works = slice < slices && steps > 0;
  Cut cut{};
  if (works) {
    const int64_t start = slice_start(steps, slices, slice);
    cursor.left = slice_start(steps, slices, slice + 1) - start;
    int low = 0, high = a.num_seqs;  // the last sequence that starts at or before `start`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= start ? low : high) = middle;
    }
    cursor.seq = low;
    skip = static_cast<int32_t>(start - before[low]);
    if (skip > 0 && part == 0) {
      const Sequence q = read_sequence(a, low, false);
      cut = {slice_of(steps, slices, before[low]), slice_of(steps, slices, before[low + 1] - 1),
             q.q_start, q.q_len};
    }
  }
  if (part == 0 && slice < d.max_slices && lane == 0) d.cuts[slice] = cut;
  __syncthreads();  // `before` gives way to the ring
  if (!works) return;
  const int head = part / d.row_tiles, first_row = (part - head * d.row_tiles) * 16;
  cursor.enter(a, first_row, skip);
  char* memory = shared + warp * Traits::kStages * Traits::kStageBytes;
  DecodeWorker<Traits> work{d,         a,         lane,   head,
                            first_row, part == 0, memory, ptx::smem_address(memory)};
  work.rows.lane = lane;
  work.run(slice, cursor);
}

}  // namespace torch_pd
