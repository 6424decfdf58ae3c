// Decode attention: few query rows a sequence, so the time is that of reading K and V once.
//
// A worker is one warp. It owns one KV head, one tile of 16 packed query rows and one slice of all
// sequences' keys, which it streams in tiles of 16 keys (never more than one page) through its own
// ring of shared memory: no two warps ever wait for each other. The slices cut the concatenation of
// all sequences' tiles into equal parts, computed by every block from seq_lens, so skewed lengths
// balance and nothing is read on the host. The heads of a slice are neighbouring warps: together
// they read whole tokens, all heads, of a page. A sequence inside one slice is finished there; one
// that is cut leaves float32 partial results, at most two per slice, that decode_combine adds up in
// the order of the slices: equal input gives equal bits.
#pragma once

#include "attention_tile.cuh"

namespace torch_pd {

constexpr int kMinSliceTiles = 4;  // below this a slice costs more to combine than it saves

struct DecodeArgs {
  AttentionArgs a;
  int32_t row_tiles;   // tiles of 16 packed rows: covers max_rows
  int32_t max_slices;  // as many as there are warps for
  int32_t* plan;       // [num_seqs + 1] tiles before each sequence; written by block 0
  float* values;       // [max_slices, 2, num_kv_heads, row_tiles * 16, D] sums of p * v
  float2* sums;        // [max_slices, 2, num_kv_heads, row_tiles * 16] maximum, sum of p
};

__device__ __forceinline__ int32_t num_slices(int32_t max_slices, int64_t tiles) {
  return static_cast<int32_t>(min(static_cast<int64_t>(max_slices),
                                  max(int64_t{1}, (tiles + kMinSliceTiles - 1) / kMinSliceTiles)));
}
// First tile of slice i, and the slice that tile x is in.
__device__ __forceinline__ int64_t slice_start(int64_t tiles, int32_t slices, int64_t i) {
  return i * tiles / slices;
}
__device__ __forceinline__ int64_t slice_of(int64_t tiles, int32_t slices, int64_t x) {
  return ((x + 1) * slices - 1) / tiles;
}
__device__ __forceinline__ int64_t partial_row(const DecodeArgs& d, int64_t slice, int which,
                                               int head, int row) {
  return ((slice * 2 + which) * d.a.num_kv_heads + head) * (d.row_tiles * 16) + row;
}

__device__ __forceinline__ int32_t num_tiles(const Sequence& q) {
  if (q.q_len == 0) return 0;
  return (q.len + kTileKeys - 1) / kTileKeys - q.begin / kTileKeys;
}

template <typename T, int D, bool FP8>
struct DecodeTraits : TileTraits<T, D, FP8> {
  using Tile = TileTraits<T, D, FP8>;
  static constexpr int kStageBytes = 2 * Tile::kTileBytes + (FP8 ? 2 * kTileKeys * 4 : 0);
  static constexpr int kWarps = D > 128 ? 4 : 8;
  static constexpr int kFit = 224 * 1024 / (kWarps * kStageBytes);
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static constexpr int kShared = kWarps * kStages * kStageBytes;
  static_assert(kStages >= 3);
};

// Steps through the tiles of a slice, sequence by sequence.
struct Cursor {
  int32_t seq;
  int32_t tile, stop;  // of this sequence, inside the slice
  int64_t left;        // tiles of the slice after this sequence
  Sequence q;

  // Enters sequence `seq` at its tile number `skip`; passes over sequences without a row of ours.
  __device__ __forceinline__ void enter(const AttentionArgs& a, int first_row, int32_t skip) {
    while (true) {
      q = read_sequence(a, seq, false);
      const int32_t tiles = num_tiles(q) - skip;
      const int32_t mine = static_cast<int32_t>(min(static_cast<int64_t>(tiles), left));
      left -= mine;
      tile = q.begin / kTileKeys + skip;
      stop = tile + mine;
      if (mine > 0 && q.q_len * a.group > first_row) return;
      tile = stop;
      if (left == 0) return;
      ++seq, skip = 0;
    }
  }
  __device__ __forceinline__ bool done() const { return tile == stop && left == 0; }
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
  __device__ __forceinline__ int32_t read_entry(const Cursor& c, int32_t tile) const {
    const int64_t key = static_cast<int64_t>(tile) * kTileKeys;
    if (tile >= c.stop || key >= c.q.len) return 0;
    return a.tables[c.seq * a.table_stride + (key >> a.block_shift)];
  }
  __device__ __forceinline__ void fill(Entries& e, const Cursor& c) const {
    e.base = c.tile;
    e.now = read_entry(c, c.tile + lane);
    e.next = read_entry(c, c.tile + 32 + lane);
  }
  __device__ __forceinline__ void load_tile(Entries& e, const Cursor& c, int stage) const {
    if (c.tile - e.base == 32) {
      e.base += 32;
      e.now = e.next;
      e.next = read_entry(c, e.base + 32 + lane);
    }
    const uint32_t to = ring + stage * Traits::kStageBytes;
    load_keys<Traits>(a, c.q, head, c.tile * kTileKeys, __shfl_sync(~0u, e.now, c.tile - e.base),
                      to, to + Traits::kTileBytes, to + 2 * Traits::kTileBytes,
                      to + 2 * Traits::kTileBytes + kTileKeys * 4, lane, reports);
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

  __device__ __forceinline__ void run(int64_t slice, Cursor loading) {
    Cursor at = loading;
    Entries entries;
    fill(entries, loading);
    int load_stage = 0, stage = 0;
    const auto load_next = [&] {
      if (loading.tile == loading.stop && loading.left > 0) {
        ++loading.seq;
        loading.enter(a, first_row, 0);
        fill(entries, loading);
      }
      if (loading.tile < loading.stop) {
        load_tile(entries, loading, load_stage);
        ++loading.tile;
        load_stage = load_stage + 1 == Traits::kStages ? 0 : load_stage + 1;
      }
      ptx::cp_async_commit();  // empty at the end: the waits below count groups
    };
#pragma unroll 1
    for (int i = 0; i < Traits::kStages - 1; ++i) load_next();
    while (true) {
      if (at.tile == at.stop) {
        if (at.left == 0) return;
        ++at.seq;
        at.enter(a, first_row, 0);
        if (at.tile == at.stop) return;
      }
      const bool from_start = at.tile == at.q.begin / kTileKeys;
      rows.begin(a, at.q, head, first_row);
#pragma unroll 1
      for (; at.tile < at.stop; ++at.tile) {
        ptx::cp_async_wait<Traits::kStages - 2>();
        __syncwarp();  // every lane's part of the tile has landed; the stage before is free
        load_next();
        const int at_stage = stage * Traits::kStageBytes;
        const float* scales =
            reinterpret_cast<const float*>(memory + at_stage + 2 * Traits::kTileBytes);
        rows.add_keys(a, at.tile * kTileKeys, ring + at_stage, ring + at_stage + Traits::kTileBytes,
                      scales, scales + kTileKeys);
        stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
      }
      const bool to_end = at.stop - at.q.begin / kTileKeys == num_tiles(at.q);
      end_sequence(at.q, slice, !from_start ? 0 : to_end ? -1 : 1);
    }
  }
};

// Prefix sums of the sequences' tiles into shared memory; block 0 also leaves them in d.plan.
// Returns the number of all tiles.
template <int THREADS>
__device__ __forceinline__ int64_t plan_slices(const DecodeArgs& d, int32_t* before,
                                               int32_t* warp_sums) {
  const AttentionArgs& a = d.a;
  const int each = (a.num_seqs + THREADS - 1) / THREADS;
  const int from = min(static_cast<int>(threadIdx.x) * each, a.num_seqs);
  const int to = min(from + each, a.num_seqs);
  int32_t mine = 0;
  for (int s = from; s < to; ++s) {
    mine += num_tiles(read_sequence(a, s, blockIdx.x == 0));
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
  for (int w = 0; w < THREADS / 32; ++w) {
    if (w < warp) offset += warp_sums[w];
    total += warp_sums[w];
  }
  for (int s = from; s < to; ++s) {
    before[s + 1] += offset;
    if (blockIdx.x == 0) d.plan[s + 1] = before[s + 1];
  }
  if (threadIdx.x == 0) {
    before[0] = 0;
    if (blockIdx.x == 0) d.plan[0] = 0;
  }
  __syncthreads();
  return total;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kWarps * 32, 1)
    decode_kernel(const __grid_constant__ DecodeArgs d) {
  extern __shared__ __align__(128) char shared[];
  const AttentionArgs& a = d.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* warp_sums = reinterpret_cast<int32_t*>(shared);
  int32_t* before = warp_sums + 32;  // the ring's memory, not in use yet
  const int64_t tiles = plan_slices<Traits::kWarps * 32>(d, before, warp_sums);
  ptx::launch_dependents();

  const int worker = blockIdx.x * Traits::kWarps + warp;
  const int parts = a.num_kv_heads * d.row_tiles;
  const int slice = worker / parts, part = worker - slice * parts;
  const int32_t slices = num_slices(d.max_slices, tiles);
  Cursor cursor;
  int32_t skip = 0;
  const bool works = slice < slices && tiles > 0;
  if (works) {
    const int64_t start = slice_start(tiles, slices, slice);
    cursor.left = slice_start(tiles, slices, slice + 1) - start;
    int low = 0, high = a.num_seqs;  // the last sequence that starts at or before `start`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= start ? low : high) = middle;
    }
    cursor.seq = low;
    skip = static_cast<int32_t>(start - before[low]);
  }
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

constexpr int kCombineWarps = 8;

// One row's result as a warp holds it: columns lane, lane + 32, ...
template <int D>
struct RowSum {
  static constexpr int kPer = (D + 31) / 32;
  float m, l, o[kPer];

  __device__ __forceinline__ void clear() {
    m = -INFINITY, l = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) o[i] = 0.0f;
  }
  __device__ __forceinline__ void read(const float* values, float2 sums, int lane) {
    m = sums.x, l = sums.y;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      o[i] = D % 32 == 0 || lane + 32 * i < D ? values[lane + 32 * i] : 0.0f;
    }
  }
  __device__ __forceinline__ void add(const RowSum& other) {
    const float top = fmaxf(m, other.m), base = finite_base(top);
    const float mine = ptx::exp2_approx(m - base), theirs = ptx::exp2_approx(other.m - base);
    m = top, l = l * mine + other.l * theirs;
#pragma unroll
    for (int i = 0; i < kPer; ++i) o[i] = o[i] * mine + other.o[i] * theirs;
  }
  template <typename T>
  __device__ __forceinline__ void write(T* out, float factor, int lane) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (D % 32 == 0 || lane + 32 * i < D) out[lane + 32 * i] = static_cast<T>(o[i] * factor);
    }
  }
};

// Adds up the partial results of one row (query token, head) of sequence `s`, slices `first` to
// `last`, or every `step`-th of them.
template <int D>
__device__ __forceinline__ RowSum<D> gather_row(const DecodeArgs& d, int row, int64_t first,
                                                int64_t last, int from, int step, int lane) {
  const AttentionArgs& a = d.a;
  const int token = row / a.num_heads, head = row - token * a.num_heads;
  const int kv_head = head / a.group;
  const int packed = token * a.group + head - kv_head * a.group;
  RowSum<D> sum, part;
  sum.clear();
#pragma unroll 4
  for (int64_t i = first + from; i <= last; i += step) {
    const int64_t at = partial_row(d, i, i == first ? 1 : 0, kv_head, packed);
    part.read(d.values + at * D, d.sums[at], lane);
    sum.add(part);
  }
  return sum;
}

template <typename T, int D>
__device__ __forceinline__ void write_row(const AttentionArgs& a, const Sequence& q, int row,
                                          const RowSum<D>& sum, int lane) {
  const int token = row / a.num_heads, head = row - token * a.num_heads;
  const Closed closed = close_row(a, sum.m, sum.l, head);
  sum.write(static_cast<T*>(a.out) + (q.q_start + token) * a.out_token + head * a.out_head,
            closed.factor, lane);
  if (a.lse != nullptr && lane == 0) a.lse[(q.q_start + token) * a.lse_token + head] = closed.lse;
}

// Finishes the sequences that more than one slice worked on. A block takes ROWS rows of one
// sequence: a warp a row, or, if there are many slices, the warps share each row's.
template <typename T, int D, int ROWS>
__global__ void __launch_bounds__(kCombineWarps * 32)
    decode_combine(const __grid_constant__ DecodeArgs d) {
  extern __shared__ __align__(128) char shared[];
  float* values = reinterpret_cast<float*>(shared);                             // [warps, ROWS, D]
  float2* sums = reinterpret_cast<float2*>(values + kCombineWarps * ROWS * D);  // [warps, ROWS]
  const AttentionArgs& a = d.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::grid_dependency_wait();
  const int64_t tiles = d.plan[a.num_seqs];
  const int s = blockIdx.y;
  const int64_t start = d.plan[s], stop = d.plan[s + 1];
  if (start == stop) return;
  const int32_t slices = num_slices(d.max_slices, tiles);
  const int64_t first = slice_of(tiles, slices, start), last = slice_of(tiles, slices, stop - 1);
  if (first == last) return;
  const Sequence q = read_sequence(a, s, false);
  const int row0 = blockIdx.x * ROWS, rows = min(ROWS, q.q_len * a.num_heads - row0);

  if (ROWS == kCombineWarps && last - first < kCombineWarps) {
    if (warp < rows) {
      write_row<T>(a, q, row0 + warp, gather_row<D>(d, row0 + warp, first, last, 0, 1, lane), lane);
    }
    return;
  }
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    const RowSum<D> sum = gather_row<D>(d, row0 + r, first, last, warp, kCombineWarps, lane);
    sum.write(values + (warp * ROWS + r) * D, 1.0f, lane);
    if (lane == 0) sums[warp * ROWS + r] = make_float2(sum.m, sum.l);
  }
  __syncthreads();
  if (warp >= rows) return;
  RowSum<D> sum, part;
  sum.clear();
  for (int w = 0; w < kCombineWarps; ++w) {
    part.read(values + (w * ROWS + warp) * D, sums[w * ROWS + warp], lane);
    sum.add(part);
  }
  write_row<T>(a, q, row0 + warp, sum, lane);
}

}  // namespace torch_pd
