// One warp's part of attention with mma.sync: 8 or 16 packed query rows against tiles of 16 keys
// that cp.async has brought to shared memory. Decode and the general prefill kernel are built of
// this.
//
// Keys and values are the left operands: scores are K q^T, sums are V^T p^T. An mma has 16 rows and
// 8 columns, so the 8 query rows of a decoding sequence leave nothing of it unused. A lane's scores
// then belong to keys lane / 4 and lane / 4 + 8 and to rows 2 (lane % 4) and the next.
#pragma once

#include "attention_keys.cuh"

namespace torch_pd {

// The query rows of one tile as B fragments, and what the softmax of this lane's rows needs.
template <typename Traits>
struct QueryRows {
  static constexpr int N = Traits::kGroups;
  uint32_t b[Traits::D / 16][N][2];
  float scale[N][2];            // FP8: the row was divided by this power of two to fit float16
  int32_t last[N][2];           // last key that the row sees
  int32_t min_last, max_first;  // keys outside [max_first, min_last] need the mask

  __device__ __forceinline__ void load(const AttentionArgs& args, const Sequence& q, int head,
                                       int first_row, int lane) {
    using T = typename Traits::T;
    const int rows = q.q_len * args.group;
    const T* source = static_cast<const T*>(args.q);
    // The k index of an mma step may be permuted if A and B agree: A fragments of bytes hold 4
    // neighbouring columns a thread, first the even ones (see compute_scores).
    constexpr int kSecond = Traits::FP8 ? 2 : 8;
    const int column = (lane % 4) * (Traits::FP8 ? 4 : 2);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int row = first_row + 8 * n + lane / 4;
      const int token = row / args.group;
      const T* from = source + (q.q_start + token) * args.q_token +
                      (head * args.group + row - token * args.group) * args.q_head + column;
#pragma unroll
      for (int k = 0; k < Traits::D / 16; ++k) {
        // Rows past the end are zero; nothing of them is stored.
        const uint32_t x = row < rows ? load2(from + k * 16) : 0;
        const uint32_t y = row < rows ? load2(from + k * 16 + kSecond) : 0;
        b[k][n][0] = Traits::FP8 ? __byte_perm(x, y, 0x5410) : x;
        b[k][n][1] = Traits::FP8 ? __byte_perm(x, y, 0x7632) : y;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int mine = first_row + 8 * n + lane % 4 * 2 + i;
        last[n][i] = q.position((mine < rows ? mine : first_row) / args.group);
      }
    }
    min_last = q.position(first_row / args.group);
    const int32_t max_last = q.position((min(first_row + Traits::kRows, rows) - 1) / args.group);
    max_first = args.window > 0 ? max(0, max_last - args.window + 1) : 0;
    if constexpr (Traits::FP8) to_float16(lane);
  }

 private:
  __device__ __forceinline__ static uint32_t load2(const typename Traits::T* p) {
    return *reinterpret_cast<const uint32_t*>(p);
  }
  __device__ __forceinline__ static float2 unpack(uint32_t x) {
    if constexpr (std::is_same_v<typename Traits::T, __half>) {
      return __half22float2(reinterpret_cast<const __half2&>(x));
    } else {
      return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x));
    }
  }
  // Each row is divided by a power of two so that its largest value is in [1, 2): bfloat16's range
  // does not fit float16, and what falls below 2^-24 of the largest value does not matter.
  __device__ __forceinline__ void to_float16(int lane) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float top = 0.0f;
#pragma unroll
      for (int k = 0; k < Traits::D / 16; ++k) {
        const float2 x = unpack(b[k][n][0]), y = unpack(b[k][n][1]);
        top = fmaxf(fmaxf(top, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(y.x), fabsf(y.y)));
      }
      top = ptx::quad_max(top);
      const float unit = __uint_as_float(max(__float_as_uint(top) & 0x7f800000u, 1u << 23));
      const float inverse = __uint_as_float((254u << 23) - __float_as_uint(unit));
#pragma unroll
      for (int k = 0; k < Traits::D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 x = unpack(b[k][n][i]);
          b[k][n][i] = ptx::pack2<__half>(x.x * inverse, x.y * inverse);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[n][i] = __shfl_sync(~0u, unit, (lane % 4 * 2 + i) * 4);
    }
  }
};

// Softmax state of kRows rows and their sums of p * v. Element [n][i] is of row
// 8 n + 2 (lane % 4) + i, see row_of.
template <typename Traits>
struct RowTile {
  static constexpr int D = Traits::D, N = Traits::kGroups;
  using T = typename Traits::T;
  using Mma = typename Traits::Mma;
  // The maximum that sums are relative to may be this much (of log2) below the true one: so it
  // settles after a few tiles, and p stays in the range of float16.
  static constexpr float kSlack = 6.0f;

  int lane;
  QueryRows<Traits> query;
  float m[N][2], l[N][2];   // maximum; this thread's share of the sum
  float o[D / 16][N][4];    // C fragments: element i + 2 h is of row i; columns: see each_pair
  float v_unit, v_inverse;  // FP8: o is in units of this scale; 1 / v_unit

  __device__ __forceinline__ int row_of(int n, int i) const { return 8 * n + lane % 4 * 2 + i; }

  __device__ __forceinline__ void begin(const AttentionArgs& a, const Sequence& q, int head,
                                        int first_row) {
    query.load(a, q, head, first_row, lane);
    v_unit = v_inverse = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      m[n][0] = m[n][1] = -INFINITY;
      l[n][0] = l[n][1] = 0.0f;
#pragma unroll
      for (int j = 0; j < D / 16; ++j) o[j][n][0] = o[j][n][1] = o[j][n][2] = o[j][n][3] = 0.0f;
    }
  }

  // Where this lane's row of the four 8 x 8 matrices of ldmatrix is, for K and (transposed) V:
  // keys 0-7, 8-15, 0-7, 8-15; the first 16 bytes twice, then the next. `tile` is aligned to 128.
  __device__ __forceinline__ uint32_t matrix_row(uint32_t tile) const {
    const int row = lane % 16;
    return tile + row * Traits::kPitch + (lane / 16 * 16 ^ Traits::swizzle(row));
  }
  // The same 32 bytes times `step` further on.
  __device__ __forceinline__ static uint32_t matrix_step(uint32_t row, int step) {
    return Traits::kSwizzled ? (row ^ step % 4 * 32) + step / 4 * 128 : row + step * 32;
  }

  // s = C fragments of the tile's keys.
  __device__ __forceinline__ void compute_scores(uint32_t keys, float (&s)[N][4]) const {
    float odd[N][4];  // of every second step: two short chains of sums, not a long one
#pragma unroll
    for (int i = 0; i < N * 4; ++i) s[i / 4][i % 4] = odd[i / 4][i % 4] = 0.0f;
    const uint32_t row = matrix_row(keys);
    // float8: 16 bytes are 16 columns, one mma step; a thread gets 4 neighbouring ones. With an odd
    // number of steps the last second 16 bytes are padding.
    constexpr int kLoads = Traits::FP8 ? (D + 16) / 32 : D / 16;
    constexpr int kBatch = Traits::kBatch < kLoads ? Traits::kBatch : kLoads;
#pragma unroll
    for (int from = 0; from < kLoads; from += kBatch) {
      uint32_t x[kBatch][4];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (from + i < kLoads) ptx::ldmatrix_x4(x[i], matrix_step(row, from + i));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = from + i;
        if (k >= kLoads) continue;
        if constexpr (!Traits::FP8) {
          float (&sum)[N][4] = Traits::kTight || k % 2 == 0 ? s : odd;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            ptx::mma<Mma>(sum[n], x[i], query.b[k][n][0], query.b[k][n][1]);
          }
        } else {
          score_bytes(s, 2 * k, x[i][0], x[i][1]);
          if (2 * k + 1 < D / 16) {
            score_bytes(Traits::kTight ? s : odd, 2 * k + 1, x[i][2], x[i][3]);
          }
        }
      }
    }
    if constexpr (!Traits::kTight) {
#pragma unroll
      for (int i = 0; i < N * 4; ++i) s[i / 4][i % 4] += odd[i / 4][i % 4];
    }
  }
  __device__ __forceinline__ void score_bytes(float (&s)[N][4], int k, uint32_t x,
                                              uint32_t y) const {
    const ptx::Halves low = Traits::to_halves(x), high = Traits::to_halves(y);
    const uint32_t a[4] = {low.even, high.even, low.odd, high.odd};
#pragma unroll
    for (int n = 0; n < N; ++n) ptx::mma<Mma>(s[n], a, query.b[k][n][0], query.b[k][n][1]);
  }

  // p: B fragments, of 16 keys.
  __device__ __forceinline__ void add_values(uint32_t values, const uint32_t (&p)[N][2]) {
    const uint32_t row = matrix_row(values);
    constexpr int kLoads = Traits::FP8 ? (D + 16) / 32 : D / 16;
    constexpr int kBatch = Traits::kBatch < kLoads ? Traits::kBatch : kLoads;
#pragma unroll
    for (int from = 0; from < kLoads; from += kBatch) {
      uint32_t x[kBatch][4];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (from + i < kLoads) ptx::ldmatrix_x4_trans(x[i], matrix_step(row, from + i));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int j = from + i;
        if (j >= kLoads) continue;
        if constexpr (!Traits::FP8) {
          const uint32_t a[4] = {x[i][0], x[i][2], x[i][1], x[i][3]};
#pragma unroll
          for (int n = 0; n < N; ++n) ptx::mma<Mma>(o[j][n], a, p[n][0], p[n][1]);
        } else {
          add_bytes(o[2 * j], p, x[i][0], x[i][1]);
          if (2 * j + 1 < D / 16) add_bytes(o[2 * j + 1], p, x[i][2], x[i][3]);
        }
      }
    }
  }
  // A transposed 16-bit element is two columns: row g of the product is the even one of pair g, row
  // g + 8 the odd one.
  __device__ __forceinline__ static void add_bytes(float (&o)[N][4], const uint32_t (&p)[N][2],
                                                   uint32_t x, uint32_t y) {
    const ptx::Halves low = Traits::to_halves(x), high = Traits::to_halves(y);
    const uint32_t a[4] = {low.even, low.odd, high.even, high.odd};
#pragma unroll
    for (int n = 0; n < N; ++n) ptx::mma<Mma>(o[n], a, p[n][0], p[n][1]);
  }

  // Adds a tile of keys from position `key` on: K and V at shared addresses `keys`, `values`.
  __device__ __forceinline__ void add_keys(const AttentionArgs& a, int32_t key, uint32_t keys,
                                           uint32_t values, const float* k_scales,
                                           const float* v_scales) {
    float s[N][4];
    compute_scores(keys, s);
    float v_scale[2];
    if constexpr (Traits::FP8) {
      const int at = lane / 4;
      const float k_scale[2] = {k_scales[at], k_scales[at + 8]};
      v_scale[0] = v_scales[at], v_scale[1] = v_scales[at + 8];
#pragma unroll
      for (int i = 0; i < N * 4; ++i) s[i / 4][i % 4] *= k_scale[i % 4 / 2];
      set_v_unit(v_scale);
    }
    // Logits are s * unit. A positive unit does not change which is the largest, so it waits for
    // the exponential, where multiplying by it costs nothing.
    float unit[N][2];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      unit[i / 2][i % 2] = a.scale_log2 * (Traits::FP8 ? query.scale[i / 2][i % 2] : 1.0f);
    }
    if (a.cap_log2 != 0.0f || a.scale_log2 <= 0.0f) {
#pragma unroll
      for (int i = 0; i < N * 4; ++i) {
        float& x = s[i / 4][i % 4];
        const float dot = Traits::FP8 ? x * query.scale[i / 4][i % 2] : x;
        x = a.cap_log2 != 0.0f ? capped_logit(a, dot) : dot * a.scale_log2;
      }
#pragma unroll
      for (int n = 0; n < N; ++n) unit[n][0] = unit[n][1] = 1.0f;
    }
    if (key + kTileKeys - 1 > query.min_last || key < query.max_first) {
#pragma unroll
      for (int i = 0; i < N * 4; ++i) {
        const int32_t at = key + lane / 4 + i % 4 / 2 * 8, last = query.last[i / 4][i % 2];
        if (at > last || (a.window > 0 && at <= last - a.window)) s[i / 4][i % 4] = -INFINITY;
      }
    }
    float most[N][2];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const int n = i / 2, r = i % 2;
      most[n][r] = fmaxf(s[n][r], s[n][r + 2]) * unit[n][r];
      grows |= most[n][r] > m[n][r] + kSlack;
    }
    if (__any_sync(~0u, grows)) raise(most);
    uint32_t p[N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float base = finite_base(m[n][i % 2]);
        s[n][i] = ptx::exp2_approx(fmaf(s[n][i], unit[n][i % 2], -base));
        l[n][i % 2] += s[n][i];
        if constexpr (Traits::FP8) s[n][i] *= v_scale[i / 2];
      }
      // From keys x pairs of rows to rows x pairs of keys.
      p[n][0] = ptx::transpose_matrix(ptx::pack2<Mma>(s[n][0], s[n][1]));
      p[n][1] = ptx::transpose_matrix(ptx::pack2<Mma>(s[n][2], s[n][3]));
    }
    add_values(values, p);
  }

  // New maxima, and what was added up so far made relative to them. most: of this thread's keys.
  __device__ __forceinline__ void raise(const float (&most)[N][2]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float top = fmaxf(m[n][r], ptx::column_max(most[n][r]));
        const float alpha = ptx::exp2_approx(m[n][r] - finite_base(top));
        m[n][r] = top;
        l[n][r] *= alpha;
#pragma unroll
        for (int j = 0; j < D / 16; ++j) o[j][n][r] *= alpha, o[j][n][r + 2] *= alpha;
      }
    }
  }

  // FP8: p * v_scale goes through float16, so it is taken relative to a unit near the largest scale
  // seen. Divides `v_scale` by the unit, raising the unit first (rare) if the scales outgrew it.
  __device__ __forceinline__ void set_v_unit(float (&v_scale)[2]) {
    float top = fmaxf(v_scale[0], v_scale[1]);
    if (__any_sync(~0u, top > v_unit * 256.0f)) {
      top = ptx::column_max(top);
      // A power of two, so that dividing by it is exact.
      const float unit = __uint_as_float(__float_as_uint(top) & 0x7f800000u);
      v_inverse = unit > 0.0f ? __frcp_rn(unit) : 0.0f;
      const float shrink = unit > 0.0f ? v_unit * v_inverse : 1.0f;
#pragma unroll
      for (int i = 0; i < D / 16 * N * 4; ++i) o[i / (4 * N)][i / 4 % N][i % 4] *= shrink;
      v_unit = unit;
    }
    v_scale[0] *= v_inverse, v_scale[1] *= v_inverse;
  }

  // Calls store(column, x, y) with all of this thread's columns, in pairs, of row_of(n, i). All
  // lanes call it together.
  template <typename Store>
  __device__ __forceinline__ void each_pair(int n, int i, Store store) const {
    if constexpr (!Traits::FP8) {
      // Columns g and g + 8 of 16 (g = lane / 4): neighbouring lanes swap one of them.
      const bool odd = lane / 4 % 2 != 0;
      const int column = lane / 4 + (odd ? 7 : 0);
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        const float x = o[j][n][i], y = o[j][n][i + 2];
        const float got = __shfl_xor_sync(~0u, odd ? x : y, 4);
        store(j * 16 + column, odd ? got : x, odd ? y : got);
      }
    } else {
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        store(j * 16 + lane / 4 * 2, o[j][n][i], o[j][n][i + 2]);
      }
    }
  }

  // Writes the rows of the sequence from first_row on.
  __device__ __forceinline__ void write(const AttentionArgs& a, const Sequence& q, int head,
                                        int first_row) const {
#pragma unroll
    for (int x = 0; x < 2 * N; ++x) {
      const int n = x / 2, i = x % 2;
      const float sum = ptx::column_sum(l[n][i]);
      const int row = first_row + row_of(n, i);
      const bool valid = row < q.q_len * a.group;
      const int token = row / a.group;
      const int query_head = valid ? head * a.group + row - token * a.group : 0;
      const Closed closed = close_row(a, m[n][i], sum, query_head);
      const float factor = closed.factor * (Traits::FP8 ? v_unit : 1.0f);
      T* out = static_cast<T*>(a.out) + (q.q_start + token) * a.out_token + query_head * a.out_head;
      each_pair(n, i, [&](int column, float x, float y) {
        if (valid) {
          *reinterpret_cast<uint32_t*>(out + column) = ptx::pack2<T>(x * factor, y * factor);
        }
      });
      if (valid && a.lse != nullptr && lane < 4) {
        a.lse[(q.q_start + token) * a.lse_token + query_head] = closed.lse;
      }
    }
  }
};

}  // namespace torch_pd
