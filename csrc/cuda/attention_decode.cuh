// Decode attention: few query rows a sequence, so the time is that of reading K and V once.
//
// A block is a team of warps. It owns one KV head, one tile of packed query rows and one slice of
// all sequences' keys; each warp has a part of the slice, goes through it alone, with a ring of
// shared memory of its own, and meets the others at the end only: what they have of a sequence that
// several of them worked on is added up there, so there are fewer partial results than if every
// warp had a slice. The slices cut the concatenation of all sequences' steps (tiles of keys) into
// equal parts, computed by every block from seq_lens, so skewed lengths balance and nothing is read
// on the host; all of them are worked on at once, since a block that starts late costs more than
// unequal speeds do (measured). The heads of a slice are neighbouring blocks: together they read
// whole tokens, all heads, of a page. A sequence inside one slice is finished there; one that is
// cut leaves float32 partial results, at most two per slice, that decode_combine adds up in the
// order of the slices: equal input gives equal bits.
#pragma once

#include "attention_deal.cuh"

namespace torch_pd {

// What a warp has of a sequence that it did not do whole.
template <typename Traits>
struct Piece {
  int32_t seq;  // -1: there is none
  bool to_end;  // holds the sequence's last keys
  Sequence q;
  const float* values;       // [kRows, kSumPitch]
  float2 of[Traits::kRows];  // maximum, sum of p
};
// A warp's pieces: of a sequence that began before its part, and of one that begins in it.
enum { kBefore, kHere };
template <typename Traits>
struct Team {
  Piece<Traits> pieces[Traits::kWarps][2];
};

template <typename Traits>
struct DecodeWorker {
  static constexpr int D = Traits::D;
  static constexpr int kWarps = Traits::kWarps;
  using T = typename Traits::T;

  const DecodeArgs& d;
  const AttentionArgs& a;
  Team<Traits>& team;
  const KeyLoader<Traits> loader;
  const int lane, warp, head, first_row;
  char* const memory;   // of this warp: kStages of K, V, k_scale, v_scale
  const uint32_t ring;  // its shared-memory address
  RowTile<Traits> rows;

  // Block table entries of this warp's next steps, one a lane, and of those after them.
  struct Entries {
    static constexpr int kSteps = 32;
    int32_t used, now, next;
  };
  __device__ __forceinline__ int32_t read_entry(const Cursor<Traits>& c, int32_t ahead) const {
    const int32_t step = c.step + ahead + lane;
    const int64_t key = int64_t{step} * Traits::kKeys;
    if (step >= c.stop || key >= c.q.len) return 0;
    return a.tables[c.seq * a.table_stride + (key >> a.block_shift)];
  }
  __device__ __forceinline__ void fill(Entries& e, const Cursor<Traits>& c) const {
    e.used = 0;
    e.now = read_entry(c, 0);
    e.next = read_entry(c, Entries::kSteps);
  }
  __device__ __forceinline__ void load_step(Entries& e, const Cursor<Traits>& c, int stage) const {
    if (e.used == Entries::kSteps) {
      e.used = 0;
      e.now = e.next;
      e.next = read_entry(c, Entries::kSteps);
    }
    const uint32_t keys = ring + stage * Traits::kStageBytes, values = keys + Traits::kTileBytes;
    loader.load(c.q, c.step * Traits::kKeys, __shfl_sync(~0u, e.now, e.used), keys, values,
                values + Traits::kTileBytes);
    ++e.used;
  }

  // Leaves the sums of this warp's steps of a sequence for end_shared: where its ring is, if that
  // is of no use any more, or else in memory of its own.
  __device__ __forceinline__ void leave(const Cursor<Traits>& at, bool from_start, bool to_end) {
    Piece<Traits>& piece = team.pieces[warp][from_start ? kHere : kBefore];
    float* values = reinterpret_cast<float*>(memory);
    if (at.left > 0) {
      values =
          d.parked + (int64_t{blockIdx.x} * kWarps + warp) * (Traits::kRows * Traits::kSumPitch);
    }
    __syncwarp();  // every lane has read the last stage
    const float unit = Traits::FP8 ? rows.v_unit : 1.0f;
#pragma unroll
    for (int x = 0; x < Traits::kRows / 4; ++x) {
      const int n = x / 2, i = x % 2, row = rows.row_of(n, i);
      const float sum = ptx::column_sum(rows.l[n][i]);
      float* to = values + row * Traits::kSumPitch;
      rows.each_pair(n, i, [&](int column, float y, float z) {
        *reinterpret_cast<float2*>(to + column) = make_float2(y * unit, z * unit);
      });
      if (lane < 4) piece.of[row] = make_float2(rows.m[n][i], sum);
    }
    if (lane == 0) {
      piece.seq = at.seq, piece.to_end = to_end, piece.q = at.q, piece.values = values;
    }
  }

  // Adds up the pieces of each sequence, in the order of the warps: a warp those whose first piece
  // it left, all of them together if there is one sequence only.
  __device__ __forceinline__ void end_shared(int64_t slice) const {
    __syncthreads();
    int32_t before[kWarps], here[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before[w] = team.pieces[w][kBefore].seq, here[w] = team.pieces[w][kHere].seq;
    }
    int first = kWarps, count = 0, from = 0;  // first: warp with a piece of the slice's first one
#pragma unroll
    for (int w = kWarps - 1; w >= 0; --w) {
      if (before[w] >= 0) first = w;
      if (here[w] >= 0) ++count, from = w;
    }
    if (first < kWarps) {
      // Begun before the slice, or by a warp before this one?
      bool begun = true;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) begun = begun && (w >= first || here[w] < 0);
      if (!begun) first = kWarps;
    }
    if (count + (first < kWarps) == 1) {
      const int thread = warp * 32 + lane;
      add_pieces(slice, first < kWarps ? first : from, first == kWarps, thread, kWarps * 32);
      return;
    }
    if (first == warp) add_pieces(slice, warp, false, lane, 32);
    if (team.pieces[warp][kHere].seq >= 0) add_pieces(slice, warp, true, lane, 32);
  }

 private:
  // Threads first, first + threads, ... add up the pieces of one sequence: whole warps of them.
  __device__ __forceinline__ void add_pieces(int64_t slice, int from, bool from_start, int first,
                                             int threads) const {
    const Piece<Traits>& start = team.pieces[from][from_start ? kHere : kBefore];
    const Sequence q = start.q;
    const Piece<Traits>* pieces[kWarps];  // null: the warp has none of it
    bool to_end = false;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Piece<Traits>& piece = w == from ? start : team.pieces[w][kBefore];
      const bool mine = w >= from && piece.seq == start.seq;
      pieces[w] = mine ? &piece : nullptr;
      if (mine) to_end = piece.to_end;
    }
    const bool whole = from_start && to_end;
    const int count = min(Traits::kRows, q.q_len * a.group - first_row);
    // A lane has what the pieces of its row are multiplied by, and where that row goes.
    static_assert(Traits::kRows <= 32);
    float factor[kWarps];
    int64_t to;
    {
      const int row = min(lane, count - 1);
      float2 sums[kWarps];
      float m = -INFINITY, l = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sums[w] = pieces[w] != nullptr ? pieces[w]->of[row] : make_float2(-INFINITY, 0.0f);
        m = fmaxf(m, sums[w].x);
      }
      const float base = finite_base(m);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        factor[w] = ptx::exp2_approx(sums[w].x - base);
        l += sums[w].y * factor[w];
      }
      const bool stores = first < 32 && lane < count;  // one warp of them
      if (whole) {
        const int token = (first_row + row) / a.group;
        const int query_head = head * a.group + first_row + row - token * a.group;
        const Closed closed = close_row(a, m, l, query_head);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) factor[w] *= closed.factor;
        to = (q.q_start + token) * a.out_token + query_head * a.out_head;
        if (stores && a.lse != nullptr) {
          a.lse[(q.q_start + token) * a.lse_token + query_head] = closed.lse;
        }
      } else {
        to = partial_row(d, slice, from_start, head, first_row + row);
        if (stores) d.sums[to] = make_float2(m, l);
        to *= D;
      }
    }
    // Many loads at once: pieces may lie in global memory. Lanes stay together.
    constexpr int kBatch = 8;
    const int all = count * (D / 4);
    for (int from = first; from - lane < all; from += kBatch * threads) {
      int row[kBatch], column[kBatch];
      float4 o[kBatch], x[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = from + u * threads;
        row[u] = min(i / (D / 4), count - 1), column[u] = i % (D / 4) * 4;
        o[u] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (pieces[w] == nullptr) continue;
        const float* values = pieces[w]->values;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (from + u * threads - lane < all) {
            x[u] =
                *reinterpret_cast<const float4*>(values + row[u] * Traits::kSumPitch + column[u]);
          }
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const float f = __shfl_sync(~0u, factor[w], row[u]);
          o[u].x += x[u].x * f, o[u].y += x[u].y * f, o[u].z += x[u].z * f, o[u].w += x[u].w * f;
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t at = __shfl_sync(~0u, to, row[u]) + column[u];
        if (from + u * threads >= all) continue;
        if (!whole) {
          *reinterpret_cast<float4*>(d.values + at) = o[u];
          continue;
        }
        auto* out = reinterpret_cast<uint32_t*>(static_cast<T*>(a.out) + at);
        out[0] = ptx::pack2<T>(o[u].x, o[u].y);
        out[1] = ptx::pack2<T>(o[u].z, o[u].w);
      }
    }
  }

 public:
  __device__ __forceinline__ void run(Cursor<Traits> loading) {
    if (lane < 2) team.pieces[warp][lane].seq = -1;
    __syncwarp();
    Cursor<Traits> at = loading;
    Entries entries;
    fill(entries, loading);
    int load_stage = 0, stage = 0;
    const auto load_next = [&] {
      if (loading.step >= loading.stop && loading.next(a, first_row)) fill(entries, loading);
      if (loading.step < loading.stop) {
        load_step(entries, loading, load_stage);
        ++loading.step;
        load_stage = load_stage + 1 == Traits::kStages ? 0 : load_stage + 1;
      }
      ptx::cp_async_commit();  // empty at the end: the waits below count groups
    };
#pragma unroll 1
    for (int i = 0; i < Traits::kStages - 1; ++i) load_next();
    if (at.begin == at.stop) return;
    do {
      rows.begin(a, at.q, head, first_row);
#pragma unroll 1
      for (; at.step < at.stop; ++at.step) {
        ptx::cp_async_wait<Traits::kStages - 2>();
        __syncwarp();  // every lane's part of the step has landed; the stage before is free
        load_next();
        const int offset = stage * Traits::kStageBytes;
        const float* scales =
            reinterpret_cast<const float*>(memory + offset + 2 * Traits::kTileBytes);
        rows.add_keys(a, at.step * Traits::kKeys, ring + offset, ring + offset + Traits::kTileBytes,
                      scales, scales + Traits::kKeys);
        stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
      }
      const bool from_start = at.begin == at.first_step();
      const bool to_end = at.stop - at.first_step() == num_steps<Traits>(at.q);
      if (from_start && to_end) {
        rows.write(a, at.q, head, first_row);
      } else {
        leave(at, from_start, to_end);
      }
    } while (at.next(a, first_row));
  }
};

// Brings lengths and block tables to the L2 cache while the kernel before may still write them: a
// line each for the first threads of the grid.
__device__ __forceinline__ void prefetch_tables(const AttentionArgs& a, int thread) {
  constexpr int kLine = 128 / sizeof(int32_t);
  const int64_t at = static_cast<int64_t>(thread) * kLine;
  if (at < a.num_seqs) ptx::prefetch_l2(a.seq_lens + at), ptx::prefetch_l2(a.query_start + at);
  if (at < (a.num_seqs - 1) * a.table_stride + a.max_pages) ptx::prefetch_l2(a.tables + at);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kWarps * 32, Traits::kBlocks)
    decode_kernel(const __grid_constant__ DecodeArgs d) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Team<Traits> team;
  const AttentionArgs& a = d.a;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::keep(lane), ptx::keep(warp);
  int32_t* warp_sums = reinterpret_cast<int32_t*>(shared);
  int32_t* before = warp_sums + 32;  // the rings' memory, not in use yet
  prefetch_tables(a, blockIdx.x * (Traits::kWarps * 32) + threadIdx.x);
  ptx::grid_dependency_wait();
  const int64_t steps = plan_slices<Traits>(d, before, warp_sums);
  ptx::launch_dependents();

  const int parts = a.num_kv_heads * d.row_tiles;
  const int slice = blockIdx.x / parts, part = blockIdx.x - slice * parts;
  const Deal deal(steps, d.max_slices, Traits::kLeastSteps);
  Cursor<Traits> cursor;
  cursor.left = 0;
  int32_t skip = 0;
  const bool works = slice < deal.slices && steps > 0;
  Cut cut{};
  if (works) {
    const int64_t first = deal.start(slice), all = deal.start(slice + 1) - first;
    const int64_t start = first + all * warp / Traits::kWarps;
    cursor.left = first + all * (warp + 1) / Traits::kWarps - start;
    int low = 0, high = a.num_seqs;  // the last sequence that starts at or before `start`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= start ? low : high) = middle;
    }
    cursor.seq = low;
    skip = static_cast<int32_t>(start - before[low]);
    if (skip > 0 && part == 0 && warp == 0) {
      const Sequence q = read_sequence(a, low, false);
      cut = {deal.slice_of(before[low]), deal.slice_of(before[low + 1] - 1), q.q_start, q.q_len};
    }
  }
  if (part == 0 && threadIdx.x == 0) d.cuts[slice] = cut;
  __syncthreads();  // `before` gives way to the rings
  if (!works) return;
  const int head = part / d.row_tiles;
  const int first_row = (part - head * d.row_tiles) * Traits::kRows;
  cursor.enter(a, first_row, skip);
  char* memory = shared + warp * Traits::kRingBytes;
  uint32_t ring = ptx::smem_address(memory);
  ptx::keep(ring);
  DecodeWorker<Traits> work{
      d,      a,    team, KeyLoader<Traits>(a, head, lane, part == 0, Traits::kKeys * 4),
      lane,   warp, head, first_row,
      memory, ring};
  work.rows.lane = lane;
  work.run(cursor);
  work.end_shared(slice);
}

}  // namespace torch_pd
