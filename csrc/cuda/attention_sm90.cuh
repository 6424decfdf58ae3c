// Prefill attention for sm_90a: 16-bit keys and values of place 0, or bytes; head_dim 64, 128 or
// 256.
//
// A block of three warpgroups stays on its multiprocessor and takes items (128 packed query rows of
// one KV head) from the list of prefill_plan. The first warpgroup loads: one warp has the copy
// engine bring K, another V, page by page, into swizzled shared memory (a page is the outermost
// coordinate of a tensor map, so the hardware checks its bounds), the others gather the query rows.
// One warp for both could not issue the copies of small pages as fast as they are used.
// The other two compute 64 rows each with wgmma; the scores of the next keys are in flight while
// this tile's softmax runs. Keys go from the last to the first: only the first tiles need a mask.
#pragma once

#include "attention_sm90_bytes.cuh"
#include "wgmma.cuh"

namespace torch_pd {

template <typename Traits>
struct Sm90Rows {
  using T = typename Traits::T;
  static constexpr int kKeys = Traits::kKeys, D = Traits::D;
  static constexpr int kScores = kKeys / 2;  // a thread's part of 64 rows x kKeys

  const AttentionArgs& a;
  int lane, warp;    // warp 0 to 3 of the warpgroup
  uint32_t q, k, v;  // shared addresses: this warpgroup's query rows, the stages
  float o[D / 2];    // element 4 j + i: row g + 8 (i / 2), column 8 j + 2 (lane % 4) + i % 2
  float m[2], l[2];  // of rows g and g + 8: maximum dot product, this thread's share of sums
  float scale;       // score * scale = logit * log2(e)
  int32_t last[2];   // last key seen
  int32_t min_last, max_first;

  __device__ __forceinline__ void begin(const Sm90Work& w, int first_row) {
    const Sequence& s = w.item.q;
    const int top = min(first_row + warp * 16, w.rows - 1);
    const int bottom = min(first_row + warp * 16 + 15, w.rows - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Rows past the end see what the last row sees; nothing of them is stored.
      last[h] = s.position(min(first_row + warp * 16 + lane / 4 + 8 * h, w.rows - 1) / a.group);
      m[h] = -INFINITY, l[h] = 0.0f;
    }
    min_last = s.position(top / a.group);
    max_first = a.window > 0 ? max(0, s.position(bottom / a.group) - a.window + 1) : 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
  }

  // s = q k^T of the tile in `stage`, asynchronously.
  __device__ __forceinline__ void start_scores(float (&s)[kScores], int stage) const {
    const uint32_t keys = k + stage * Traits::kTileBytes;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const uint32_t column = i % 4 * 32;
      ptx::wgmma_ss<T, kKeys>(s, ptx::matrix_descriptor(q + i / 4 * Traits::kQBlock + column, 0),
                              ptx::matrix_descriptor(keys + i / 4 * Traits::kKVBlock + column, 0),
                              i > 0);
    }
    ptx::wgmma_commit();
  }
  // o += p v of the tile in `stage`, asynchronously.
  __device__ __forceinline__ void start_values(const uint32_t (&p)[kKeys / 16][4], int stage) {
    const uint32_t values = v + stage * Traits::kTileBytes;
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      ptx::wgmma_rs<T, D>(o, p[i],
                          ptx::matrix_descriptor(values + i * (16 * 128), Traits::kKVBlock));
    }
    ptx::wgmma_commit();
  }

  // Scores to weights relative to the new maxima; alpha is what earlier sums must be scaled with.
  __device__ __forceinline__ void softmax(float (&s)[kScores], int32_t n, float (&alpha)[2]) {
    const int32_t key = n * kKeys;
    if (a.cap_log2 != 0.0f) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = capped_logit(a, s[i]);
    }
    if (key + kKeys - 1 > min_last || key < max_first) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int32_t at = key + i / 4 * 8 + lane % 4 * 2 + i % 2, end = last[i / 2 % 2];
        if (at > end || (a.window > 0 && at <= end - a.window)) s[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = m[h];
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
        top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      }
      top = ptx::quad_max(top);
      const float base = finite_base(top) * scale;
      alpha[h] = ptx::exp2_approx(m[h] * scale - base);
      m[h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * h; i < 4 * j + 2 * h + 2; ++i) {
          s[i] = ptx::exp2_approx(s[i] * scale - base);
          sum += s[i];
        }
      }
      l[h] = l[h] * alpha[h] + sum;
    }
  }

  // Bytes: times the scales of the tile's keys, or of its values.
  __device__ __forceinline__ void times(float (&s)[kScores], uint32_t scales) const {
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const float2 x = ptx::load_shared8(scales + (j * 8 + lane % 4 * 2) * 4);
      s[4 * j] *= x.x, s[4 * j + 1] *= x.y, s[4 * j + 2] *= x.x, s[4 * j + 3] *= x.y;
    }
  }

  __device__ __forceinline__ static void pack(const float (&s)[kScores],
                                              uint32_t (&p)[kKeys / 16][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i / 4][i % 4] = ptx::pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  __device__ __forceinline__ void rescale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= alpha[i / 2 % 2];
  }

  // Divides by the sums and writes 16 bytes a lane: the lanes of a quad swap their pairs of
  // columns.
  __device__ __forceinline__ void end(const Sm90Work& w, int first_row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = ptx::quad_sum(l[h]);
      const int row = first_row + warp * 16 + lane / 4 + 8 * h;
      const bool valid = row < w.rows;
      const int token = row / a.group, head = w.head * a.group + row - token * a.group;
      const Closed closed = close_row(a, m[h] * scale, sum, valid ? head : 0);
      T* out =
          static_cast<T*>(a.out) + (w.item.q.q_start + token) * a.out_token + head * a.out_head;
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (4 * j + i) + 2 * h;
          x[i] = ptx::pack2<T>(o[at] * closed.factor, o[at + 1] * closed.factor);
        }
        ptx::transpose_quad(x, lane);
        if (valid) {
          *reinterpret_cast<uint4*>(out + j * 32 + lane % 4 * 8) =
              make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
      if (valid && a.lse != nullptr && lane % 4 == 0) {
        a.lse[(w.item.q.q_start + token) * a.lse_token + head] = closed.lse;
      }
    }
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    prefill_sm90(const __grid_constant__ Sm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // another architecture of the same build has no use for it
  extern __shared__ __align__(128) char shared[];
  const PrefillArgs& p = args.p;
  const uint32_t memory = (ptx::smem_address(shared) + 1023) / 1024 * 1024;
  const Sm90Barriers<Traits> barriers{memory + Traits::kBarriers};
  const int thread = threadIdx.x, lane = thread % 32, group = thread / 128;
  constexpr int kLoadWarps = Traits::kBytes ? 4 : 2;  // that gather queries
  constexpr int kFull = Traits::kBytes ? 128 : 1;     // arrivals beside the copy engine's bytes
  if (thread == 0) {
    ptx::barrier_init(barriers.q_full(), kLoadWarps * 32);
    ptx::barrier_init(barriers.q_empty(), 8);
    for (int s = 0; s < Traits::kStages; ++s) {
      ptx::barrier_init(barriers.k_full(s), kFull);
      ptx::barrier_init(barriers.k_empty(s), 8);  // warps of the two computing warpgroups
      ptx::barrier_init(barriers.v_full(s), kFull);
      ptx::barrier_init(barriers.v_empty(s), 8);
    }
    for (int s = 0; s < Traits::kSlots; ++s) {
      ptx::barrier_init(barriers.slot_full(s), 1);
      ptx::barrier_init(barriers.slot_empty(s), 4);  // warps of the loading warpgroup
    }
    ptx::barrier_init_fence();
    ptx::bulk_prefetch_map(&args.k);
    ptx::bulk_prefetch_map(&args.v);
  }
  __syncthreads();
  Sm90Items items{*p.count * p.a.num_kv_heads};

  if (group == 0) {
    ptx::registers_shrink<Traits::kLoadRegisters>();
    if constexpr (Traits::kBytes) {
      load_bytes<Traits>(args, memory, barriers, items, thread);
    } else if (thread < 64) {
      const bool keys = thread < 32;
      Ring ring{0, 1};  // parity 1: the first pass over the ring does not wait
      for (int32_t i; (i = items.next()) >= 0;) {
        const Sm90Work w = read_work<Traits>(p, i);
        const Sm90Loader<Traits> loader{p, w, lane};
        int32_t page = loader.page_of(w.stop_tile - 1);
        for (int32_t n = w.stop_tile - 1; n >= w.first_tile; --n) {
          const int32_t next = loader.page_of(n - 1);  // while the stage is still in use
          const uint32_t offset = ring.stage * Traits::kTileBytes;
          if (keys) {
            ptx::barrier_wait(barriers.k_empty(ring.stage), ring.parity);
            loader.load_keys(args.k, memory + Traits::kK + offset, barriers.k_full(ring.stage), n,
                             page);
          } else {
            ptx::barrier_wait(barriers.v_empty(ring.stage), ring.parity);
            loader.load_values(args.v, memory + Traits::kV + offset, barriers.v_full(ring.stage), n,
                               page);
          }
          page = next;
          ring.advance<Traits::kStages>();
        }
      }
    } else {
      uint32_t parity = 1;
      for (int32_t i; (i = items.next()) >= 0;) {
        const Sm90Work w = read_work<Traits>(p, i);
        ptx::barrier_wait(barriers.q_empty(), parity);
        load_queries<Traits>(p.a, w, memory + Traits::kQ, thread - 64, kLoadWarps * 32);
        ptx::cp_async_wait<0>();
        ptx::async_proxy_fence();
        ptx::barrier_arrive(barriers.q_full());
        parity ^= 1;
      }
    }
  } else {
    ptx::registers_grow<Traits::kRegisters>();
    Sm90Rows<Traits> rows{p.a,
                          lane,
                          thread / 32 % 4,
                          memory + Traits::kQ + (group - 1) * (64 * 128),
                          memory + Traits::kK,
                          memory + Traits::kV};
    rows.scale = p.a.cap_log2 == 0.0f ? p.a.scale_log2 : 1.0f;
    const auto release = [&](uint32_t barrier) {
      if (lane == 0) ptx::barrier_arrive(barrier);
    };
    Ring k_ring, v_ring;
    uint32_t q_parity = 0, scales = memory + Traits::kScales;  // of the tile
    const auto next_scales = [&] {
      scales += Traits::kScaleBytes;
      if (scales == memory + Traits::kBarriers) scales = memory + Traits::kScales;
    };
    for (int32_t i; (i = items.next()) >= 0;) {
      const Sm90Work w = read_work<Traits>(p, i);
      const int first_row = w.row0 + (group - 1) * 64;
      rows.begin(w, first_row);
      float s[Traits::kKeys / 2], alpha[2];
      uint32_t weights[Traits::kKeys / 16][4];

      ptx::barrier_wait(barriers.q_full(), q_parity);
      q_parity ^= 1;
      ptx::barrier_wait(barriers.k_full(k_ring.stage), k_ring.parity);
      ptx::hold(s);
      ptx::wgmma_fence();
      rows.start_scores(s, k_ring.stage);
      ptx::wgmma_wait<0>();
      ptx::hold(s);
      release(barriers.k_empty(k_ring.stage));
      k_ring.template advance<Traits::kStages>();
      if constexpr (Traits::kBytes) rows.times(s, scales);
      rows.softmax(s, w.stop_tile - 1, alpha);  // nothing to rescale yet
      if constexpr (Traits::kBytes) rows.times(s, scales + Traits::kKeys * 4), next_scales();
      rows.pack(s, weights);

#pragma unroll 1
      for (int32_t n = w.stop_tile - 2; n >= w.first_tile; --n) {
        ptx::barrier_wait(barriers.k_full(k_ring.stage), k_ring.parity);
        ptx::hold(s);
        ptx::hold(rows.o);
        ptx::wgmma_fence();
        rows.start_scores(s, k_ring.stage);
        ptx::barrier_wait(barriers.v_full(v_ring.stage), v_ring.parity);
        rows.start_values(weights, v_ring.stage);
        ptx::wgmma_wait<1>();
        ptx::hold(s);
        release(barriers.k_empty(k_ring.stage));
        k_ring.template advance<Traits::kStages>();
        if constexpr (Traits::kBytes) rows.times(s, scales);
        rows.softmax(s, n, alpha);
        if constexpr (Traits::kBytes) rows.times(s, scales + Traits::kKeys * 4), next_scales();
        ptx::wgmma_wait<0>();
        ptx::hold(rows.o);
        release(barriers.v_empty(v_ring.stage));
        v_ring.template advance<Traits::kStages>();
        rows.rescale(alpha);
        rows.pack(s, weights);
      }
      release(barriers.q_empty());
      ptx::barrier_wait(barriers.v_full(v_ring.stage), v_ring.parity);
      ptx::hold(rows.o);
      ptx::wgmma_fence();
      rows.start_values(weights, v_ring.stage);
      ptx::wgmma_wait<0>();
      ptx::hold(rows.o);
      release(barriers.v_empty(v_ring.stage));
      v_ring.template advance<Traits::kStages>();
      rows.end(w, first_row);
    }
  }
#endif
}

}  // namespace torch_pd
