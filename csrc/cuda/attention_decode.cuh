// Decode attention: few query rows a sequence, so the time is that of reading K and V once.
//
// A block is a team of warps. It owns one KV head, one tile of 16 packed query rows and one slice
// of all sequences' keys. Its warps take the slice's steps (one or two tiles of keys) in turn, each
// through its own ring of shared memory, and add up what they have at the end of each sequence:
// there are fewer partial results than if every warp had a slice. The slices cut the concatenation
// of all sequences' steps into equal parts, computed by every block from seq_lens, so skewed
// lengths balance and nothing is read on the host; all of them are worked on at once, since a block
// that starts late costs more than unequal speeds do (measured). The heads of a slice are
// neighbouring blocks: together they read whole tokens, all heads, of a page. A sequence inside one
// slice is finished there; one that is cut leaves float32 partial results, at most two per slice,
// that decode_combine adds up in the order of the slices: equal input gives equal bits.
#pragma once

#include "attention_deal.cuh"

namespace torch_pd {

// What a team's warps tell each other at the end of a sequence.
template <typename Traits>
struct TeamSums {
  float2 of[Traits::kWarps][16];  // maximum, sum of p
  const float* values[Traits::kWarps];
};

template <typename Traits>
struct DecodeWorker {
  static constexpr int D = Traits::D;
  static constexpr int kWarps = Traits::kWarps;
  using T = typename Traits::T;

  const DecodeArgs& d;
  const AttentionArgs& a;
  TeamSums<Traits>& team;
  const int lane, warp, head, first_row;
  const bool reports;
  char* const memory;   // of this warp: kStages of K, V, k_scale, v_scale
  const uint32_t ring;  // its shared-memory address
  RowTile<Traits> rows;

  // Block table entries of this warp's next steps, one a lane, and of those after them.
  struct Entries {
    static constexpr int kSteps = 32 / Traits::kTiles;
    int32_t used, now, next;
  };
  __device__ __forceinline__ int32_t read_entry(const Cursor<Traits>& c, int32_t ahead) const {
    const int32_t step = c.step + (ahead + lane / Traits::kTiles) * kWarps;
    const int64_t key =
        (static_cast<int64_t>(step) * Traits::kTiles + lane % Traits::kTiles) * kTileKeys;
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
    const uint32_t keys = ring + stage * Traits::kStageBytes, values = keys + Traits::kHalfBytes;
    const uint32_t k_scales = values + Traits::kHalfBytes, v_scales = k_scales + Traits::kKeys * 4;
#pragma unroll
    for (int t = 0; t < Traits::kTiles; ++t) {
      const int tile = c.step * Traits::kTiles + t, at = t * Traits::kTileBytes;
      load_keys<Traits>(a, c.q, head, tile * kTileKeys,
                        __shfl_sync(~0u, e.now, e.used * Traits::kTiles + t), keys + at,
                        values + at, k_scales + t * kTileKeys * 4, v_scales + t * kTileKeys * 4,
                        lane, reports);
    }
    ++e.used;
  }

  // Where a sequence's result goes. partial: -1 if it lies in this slice whole, else which of the
  // slice's two partial results it is.
  struct Target {
    int64_t slice;
    int partial;
  };

  // The only warp with keys of this sequence writes them.
  __device__ __forceinline__ void end_alone(const Sequence& q, const Target& to) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = ptx::quad_sum(rows.l[h]);
      const int row = first_row + lane / 4 + 8 * h;
      if (row >= q.q_len * a.group) continue;
      if (to.partial < 0) {
        rows.write(a, q, head, row, h, sum);
        continue;
      }
      const int64_t at = partial_row(d, to.slice, to.partial, head, row);
      leave(d.values + at * D, h);
      if (lane % 4 == 0) d.sums[at] = make_float2(rows.m[h], sum);
    }
  }

  // This warp's sums of half h of its rows, in their own unit.
  __device__ __forceinline__ void leave(float* values, int h) const {
    const float unit = Traits::FP8 ? rows.v_unit : 1.0f;
    rows.each_pair(h, [&](int column, float x, float y) {
      *reinterpret_cast<float2*>(values + column) = make_float2(x * unit, y * unit);
    });
  }

  // For end_shared; `mine`: where this warp's sums fit until its next load.
  __device__ __forceinline__ void show(const Sequence& q, float* mine) {
    __syncwarp();  // every lane has read the stage
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = ptx::quad_sum(rows.l[h]);
      const int row = lane / 4 + 8 * h;
      if (first_row + row >= q.q_len * a.group) continue;
      leave(mine + row * Traits::kSumPitch, h);
      if (lane % 4 == 0) team.of[warp][row] = make_float2(rows.m[h], sum);
    }
    if (lane == 0) team.values[warp] = mine;
  }

  // Adds up what `sharing` warps from `first` on, those with keys, have shown.
  __device__ __forceinline__ void end_shared(const Sequence& q, const Target& to, int first,
                                             int sharing) const {
    const int count = min(16, q.q_len * a.group - first_row);
    __syncthreads();
    for (int i = warp * 32 + lane; i < count * (D / 4); i += kWarps * 32) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      float m = -INFINITY, l = 0.0f;
      for (int w = 0; w < sharing; ++w) {
        m = fmaxf(m, team.of[(first + w) % kWarps][row].x);
      }
      const float base = finite_base(m);
      float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int w = 0; w < sharing; ++w) {
        const int from = (first + w) % kWarps;
        const float2 sums = team.of[from][row];
        const float factor = ptx::exp2_approx(sums.x - base);
        const float4 x =
            *reinterpret_cast<const float4*>(team.values[from] + row * Traits::kSumPitch + column);
        l += sums.y * factor;
        o.x += x.x * factor, o.y += x.y * factor, o.z += x.z * factor, o.w += x.w * factor;
      }
      if (to.partial >= 0) {
        const int64_t at = partial_row(d, to.slice, to.partial, head, first_row + row);
        *reinterpret_cast<float4*>(d.values + at * D + column) = o;
        if (column == 0) d.sums[at] = make_float2(m, l);
        continue;
      }
      const int token = (first_row + row) / a.group;
      const int query_head = head * a.group + first_row + row - token * a.group;
      const Closed closed = close_row(a, m, l, query_head);
      auto* out =
          reinterpret_cast<uint32_t*>(static_cast<T*>(a.out) + (q.q_start + token) * a.out_token +
                                      query_head * a.out_head + column);
      out[0] = ptx::pack2<T>(o.x * closed.factor, o.y * closed.factor);
      out[1] = ptx::pack2<T>(o.z * closed.factor, o.w * closed.factor);
      if (a.lse != nullptr && column == 0) {
        a.lse[(q.q_start + token) * a.lse_token + query_head] = closed.lse;
      }
    }
    __syncthreads();  // now the stages may be loaded again
  }

  __device__ __forceinline__ void run(int64_t slice, Cursor<Traits> loading) {
    Cursor<Traits> at = loading;
    Entries entries;
    fill(entries, loading);
    int load_stage = 0, stage = 0;
    const auto load_next = [&] {
      while (loading.step >= loading.stop && loading.next(a, first_row, warp)) {
        fill(entries, loading);
      }
      if (loading.step < loading.stop) {
        load_step(entries, loading, load_stage);
        loading.step += kWarps;
        load_stage = load_stage + 1 == Traits::kStages ? 0 : load_stage + 1;
      }
      ptx::cp_async_commit();  // empty at the end: the waits below count groups
    };
#pragma unroll 1
    for (int i = 0; i < Traits::kStages - 1; ++i) load_next();
    if (at.begin == at.stop) return;
    do {
      const int32_t steps = at.stop - at.begin;
      const bool works = at.step < at.stop;
      int last = 0;
      if (works) rows.begin(a, at.q, head, first_row);
#pragma unroll 1
      for (; at.step < at.stop; at.step += kWarps) {
        ptx::cp_async_wait<Traits::kStages - 2>();
        __syncwarp();  // every lane's part of the step has landed; the stage before is free
        load_next();
        last = stage * Traits::kStageBytes;
        const float* scales =
            reinterpret_cast<const float*>(memory + last + 2 * Traits::kHalfBytes);
        rows.template add_keys<Traits::kTiles>(a, at.step * Traits::kKeys, ring + last,
                                               ring + last + Traits::kHalfBytes, scales,
                                               scales + Traits::kKeys);
        stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
      }
      const bool from_start = at.begin == at.first_step();
      const bool to_end = at.stop - at.first_step() == num_steps<Traits>(at.q);
      const Target to{slice, !from_start ? 0 : to_end ? -1 : 1};
      if (steps > 1) {
        if (works) show(at.q, reinterpret_cast<float*>(memory + last));
        end_shared(at.q, to, at.done % kWarps, min(kWarps, steps));
      } else if (works) {
        end_alone(at.q, to);
      }
    } while (at.next(a, first_row, warp));
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
  __shared__ TeamSums<Traits> team;
  const AttentionArgs& a = d.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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
  int32_t skip = 0;
  const bool works = slice < deal.slices && steps > 0;
  Cut cut{};
  if (works) {
    const int64_t start = deal.start(slice);
    cursor.left = deal.start(slice + 1) - start;
    cursor.done = 0;
    int low = 0, high = a.num_seqs;  // the last sequence that starts at or before `start`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= start ? low : high) = middle;
    }
    cursor.seq = low;
    skip = static_cast<int32_t>(start - before[low]);
    if (skip > 0 && part == 0) {
      const Sequence q = read_sequence(a, low, false);
      cut = {deal.slice_of(before[low]), deal.slice_of(before[low + 1] - 1), q.q_start, q.q_len};
    }
  }
  if (part == 0 && threadIdx.x == 0) d.cuts[slice] = cut;
  __syncthreads();  // `before` gives way to the rings
  if (!works) return;
  const int head = part / d.row_tiles, first_row = (part - head * d.row_tiles) * 16;
  cursor.enter(a, first_row, warp, skip);
  char* memory = shared + warp * Traits::kRingBytes;
  DecodeWorker<Traits> work{d,    a,         team,      lane,   warp,
                            head, first_row, part == 0, memory, ptx::smem_address(memory)};
  work.rows.lane = lane;
  work.run(slice, cursor);
}

}  // namespace torch_pd
