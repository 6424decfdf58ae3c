// One warp's part of attention with mma.sync: 16 packed query rows against tiles of 16 keys that
// cp.async has brought to shared memory. Decode and the general prefill kernel are built of this.
#pragma once

#include "attention.cuh"

namespace torch_pd {

constexpr int kTileKeys = 16;  // never more than one page

template <typename T_, int D_, int STORED>
struct TileTraits {
  using T = T_;                                                    // of q and out
  using Mma = std::conditional_t<STORED != kAsQuery, __half, T_>;  // bytes are exact in float16
  static constexpr int D = D_;
  static constexpr bool FP8 = STORED != kAsQuery;  // either kind of bytes
  static __device__ __forceinline__ ptx::Halves to_halves(uint32_t bytes) {
    return STORED == kInt8 ? ptx::int8_to_halves(bytes) : ptx::float8_to_halves(bytes);
  }
  static constexpr int kRowBytes = D * (FP8 ? 1 : 2);
  static constexpr int kChunks = kRowBytes / 16;
  // An odd number of 16-byte chunks: ldmatrix reads 8 rows without bank conflicts.
  static constexpr int kPitch = (kChunks | 1) * 16;
  static constexpr int kTileBytes = kTileKeys * kPitch;  // of K or V
  static_assert(D % 16 == 0);
};

// Copies one head of K and V of 16 keys from `key` on, which block table entry `entry` holds, to
// shared memory; keys outside [q.begin, q.len) and of bad pages are filled with zeros (a page's
// unused tokens may hold NaN). scales: [16] k_scale; v_scale follows `v_scales` bytes on.
template <typename Traits>
__device__ __forceinline__ void load_keys(const AttentionArgs& a, const Sequence& q, int head,
                                          int32_t key, int32_t entry, uint32_t keys,
                                          uint32_t values, uint32_t k_scales, uint32_t v_scales,
                                          int lane, bool reports) {
  Page page{a.k, a.v, a.k_scale, a.v_scale, false};
  if (key < q.len && key + kTileKeys > q.begin) {
    page = find_page<Traits::FP8>(a, entry, reports && lane == 0);
  }
  const int first = page.valid ? max(0, q.begin - key) : kTileKeys;
  const int stop = min(kTileKeys, q.len - key);
  const int in_page = key & ((1 << a.block_shift) - 1);
  const char* k = page.k + in_page * static_cast<int64_t>(a.k_token) + head * a.k_head;
  const char* v = page.v + in_page * static_cast<int64_t>(a.v_token) + head * a.v_head;
  constexpr int kCopies = kTileKeys * Traits::kChunks;
  if (32 % Traits::kChunks == 0 && first == 0 && stop == kTileKeys) {
    // Nearly all tiles: a lane stays in its column, without a test a copy.
    constexpr int kRows = 32 / Traits::kChunks;
    const int row = lane / Traits::kChunks, column = lane % Traits::kChunks * 16;
    const uint32_t at = row * Traits::kPitch + column;
    const char *k_row = k + row * a.k_token + column, *v_row = v + row * a.v_token + column;
#pragma unroll
    for (int i = 0; i < kTileKeys; i += kRows) {
      ptx::cp_async16(keys + at + i * Traits::kPitch, k_row, true);
      ptx::cp_async16(values + at + i * Traits::kPitch, v_row, true);
      k_row += kRows * a.k_token, v_row += kRows * a.v_token;
    }
  } else {
#pragma unroll
    for (int i = 0; i < (kCopies + 31) / 32; ++i) {
      const int c = i * 32 + lane;
      if (kCopies % 32 != 0 && c >= kCopies) break;
      const int row = c / Traits::kChunks, column = (c - row * Traits::kChunks) * 16;
      const bool valid = row >= first && row < stop;
      const uint32_t at = row * Traits::kPitch + column;
      ptx::cp_async16(keys + at, valid ? k + row * a.k_token + column : a.k, valid);
      ptx::cp_async16(values + at, valid ? v + row * a.v_token + column : a.v, valid);
    }
  }
  if constexpr (Traits::FP8) {
    const int row = lane % 16;
    const bool valid = row >= first && row < stop;
    const float* source =
        lane < 16 ? page.k_scale + static_cast<int64_t>(in_page + row) * a.ks_token + head
                  : page.v_scale + static_cast<int64_t>(in_page + row) * a.vs_token + head;
    ptx::cp_async4((lane < 16 ? k_scales : v_scales) + row * 4, valid ? source : a.k_scale, valid);
  }
}

// The query rows of one tile as A fragments, and what the softmax of each row needs.
template <typename Traits>
struct QueryRows {
  uint32_t a[Traits::D / 16][4];
  float scale[2];               // FP8: q was divided by this power of two to fit float16
  int32_t last[2];              // last key that rows g, g + 8 see
  int32_t min_last, max_first;  // keys outside [max_first, min_last] need the mask

  __device__ __forceinline__ void load(const AttentionArgs& args, const Sequence& q, int head,
                                       int first_row, int lane) {
    using T = typename Traits::T;
    const int rows = q.q_len * args.group;
    const T* source = static_cast<const T*>(args.q);
    const T* row_of[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + lane / 4 + 8 * h;
      const int token = row / args.group;
      // Rows past the end repeat row 0 of the tile; nothing of them is stored.
      last[h] = q.position(row < rows ? token : first_row / args.group);
      row_of[h] = row < rows ? source + (q.q_start + token) * args.q_token +
                                   (head * args.group + row - token * args.group) * args.q_head
                             : nullptr;
    }
    min_last = q.position(first_row / args.group);
    const int32_t max_last = q.position((min(first_row + 16, rows) - 1) / args.group);
    max_first = args.window > 0 ? max(0, max_last - args.window + 1) : 0;
    // The k index of an mma step may be permuted if A and B agree: B fragments of bytes hold 4
    // neighbouring columns a thread, first the even ones (see compute_scores).
    constexpr int kSecond = Traits::FP8 ? 2 : 8;
    const int column = (lane % 4) * (Traits::FP8 ? 4 : 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int k = 0; k < Traits::D / 16; ++k) {
        const T* p = row_of[h] + k * 16 + column;
        const uint32_t x = row_of[h] != nullptr ? load2(p) : 0;
        const uint32_t y = row_of[h] != nullptr ? load2(p + kSecond) : 0;
        a[k][h] = Traits::FP8 ? __byte_perm(x, y, 0x5410) : x;
        a[k][h + 2] = Traits::FP8 ? __byte_perm(x, y, 0x7632) : y;
      }
    }
    if constexpr (Traits::FP8) to_float16();
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
  __device__ __forceinline__ void to_float16() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = 0.0f;
#pragma unroll
      for (int k = 0; k < Traits::D / 16; ++k) {
        const float2 x = unpack(a[k][h]), y = unpack(a[k][h + 2]);
        top = fmaxf(fmaxf(top, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(y.x), fabsf(y.y)));
      }
      top = ptx::quad_max(top);
      scale[h] = __uint_as_float(max(__float_as_uint(top) & 0x7f800000u, 1u << 23));
      const float inverse = __uint_as_float((254u << 23) - __float_as_uint(scale[h]));
#pragma unroll
      for (int k = 0; k < Traits::D / 16; ++k) {
#pragma unroll
        for (int i = h; i < 4; i += 2) {
          const float2 x = unpack(a[k][i]);
          a[k][i] = ptx::pack2<__half>(x.x * inverse, x.y * inverse);
        }
      }
    }
  }
};

// Softmax state of 16 rows and their sums of p * v.
template <typename Traits>
struct RowTile {
  static constexpr int D = Traits::D;
  using T = typename Traits::T;
  using Mma = typename Traits::Mma;

  int lane;
  QueryRows<Traits> query;
  float m[2], l[2];         // rows g, g + 8: maximum; this thread's share of the sum
  float o[D / 8][4];        // C fragments
  float v_unit, v_inverse;  // FP8: o is in units of this scale; 1 / v_unit

  __device__ __forceinline__ void begin(const AttentionArgs& a, const Sequence& q, int head,
                                        int first_row) {
    query.load(a, q, head, first_row, lane);
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0.0f;
    v_unit = v_inverse = 0.0f;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;
  }

  // s[n] = C fragment of keys 8 n .. 8 n + 7 of TILES tiles; their rows follow each other.
  template <int TILES>
  __device__ __forceinline__ void compute_scores(uint32_t keys, float (&s)[2 * TILES][4]) const {
#pragma unroll
    for (int n = 0; n < 2 * TILES; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
    // Rows of the four matrices: keys 0-7, 0-7, 8-15, 8-15; columns: first, second 16 bytes.
    const uint32_t at = keys + (lane % 8 + lane / 16 * 8) * Traits::kPitch + lane / 8 % 2 * 16;
    // float8: 16 bytes are 16 columns, one mma step; a thread gets 4 neighbouring ones.
    constexpr int kSteps = Traits::FP8 ? D / 32 : D / 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, at + t * Traits::kTileBytes + k * 32);
        if constexpr (!Traits::FP8) {
          ptx::mma<Mma>(s[2 * t], query.a[k], b[0], b[1]);
          ptx::mma<Mma>(s[2 * t + 1], query.a[k], b[2], b[3]);
        } else {
          step_fp8(s[2 * t], 2 * k, b[0]), step_fp8(s[2 * t + 1], 2 * k, b[2]);
          step_fp8(s[2 * t], 2 * k + 1, b[1]), step_fp8(s[2 * t + 1], 2 * k + 1, b[3]);
        }
      }
    }
    if constexpr (Traits::FP8 && D % 32 != 0) {  // the second 16 bytes are padding
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, at + t * Traits::kTileBytes + D / 32 * 32);
        step_fp8(s[2 * t], D / 16 - 1, b[0]), step_fp8(s[2 * t + 1], D / 16 - 1, b[2]);
      }
    }
  }
  __device__ __forceinline__ void step_fp8(float (&s)[4], int k, uint32_t x) const {
    const ptx::Halves b = Traits::to_halves(x);
    ptx::mma<Mma>(s, query.a[k], b.even, b.odd);
  }

  __device__ __forceinline__ void add_values(uint32_t values, const uint32_t (&p)[4]) {
    // Rows of the four matrices: keys 0-7, 8-15, 0-7, 8-15; columns: first, second 16 bytes.
    const uint32_t at = values + lane % 16 * Traits::kPitch + lane / 16 * 16;
    if constexpr (!Traits::FP8) {
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, at + j * 32);
        ptx::mma<Mma>(o[2 * j], p, b[0], b[1]);
        ptx::mma<Mma>(o[2 * j + 1], p, b[2], b[3]);
      }
    } else {
      // A 16-bit element is two columns: o[2 j] gets the even ones of 16, o[2 j + 1] the odd ones.
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, at + j * 32);
        add_fp8(o[4 * j], o[4 * j + 1], p, b[0], b[1]);
        add_fp8(o[4 * j + 2], o[4 * j + 3], p, b[2], b[3]);
      }
      if constexpr (D % 32 != 0) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, at + D / 32 * 32);
        add_fp8(o[D / 8 - 2], o[D / 8 - 1], p, b[0], b[1]);
      }
    }
  }
  __device__ __forceinline__ void add_fp8(float (&even)[4], float (&odd)[4], const uint32_t (&p)[4],
                                          uint32_t x, uint32_t y) {
    const ptx::Halves b0 = Traits::to_halves(x), b1 = Traits::to_halves(y);
    ptx::mma<Mma>(even, p, b0.even, b1.even);
    ptx::mma<Mma>(odd, p, b0.odd, b1.odd);
  }

  // Adds TILES tiles of keys from position `key` on: K and V at shared addresses `keys`, `values`.
  template <int TILES = 1>
  __device__ __forceinline__ void add_keys(const AttentionArgs& a, int32_t key, uint32_t keys,
                                           uint32_t values, const float* k_scales,
                                           const float* v_scales) {
    constexpr int N = 2 * TILES;
    float s[N][4];
    compute_scores<TILES>(keys, s);
    float v_scale[N][2];
    if constexpr (Traits::FP8) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float2 k2 = *reinterpret_cast<const float2*>(k_scales + n * 8 + lane % 4 * 2);
        const float2 v2 = *reinterpret_cast<const float2*>(v_scales + n * 8 + lane % 4 * 2);
        s[n][0] *= k2.x, s[n][1] *= k2.y, s[n][2] *= k2.x, s[n][3] *= k2.y;
        v_scale[n][0] = v2.x, v_scale[n][1] = v2.y;
      }
      set_v_unit(v_scale);
    }
    // Logits are s * unit. A positive unit does not change which is the largest, so it waits for
    // the exponential, where multiplying by it costs nothing.
    float unit[2] = {a.scale_log2, a.scale_log2};
    if constexpr (Traits::FP8) unit[0] *= query.scale[0], unit[1] *= query.scale[1];
    if (a.cap_log2 != 0.0f || a.scale_log2 <= 0.0f) {
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) {
        float& x = s[i / 4][i % 4];
        const float dot = Traits::FP8 ? x * query.scale[i % 4 / 2] : x;
        x = a.cap_log2 != 0.0f ? capped_logit(a, dot) : dot * a.scale_log2;
      }
      unit[0] = unit[1] = 1.0f;
    }
    const bool masked = key + TILES * kTileKeys - 1 > query.min_last || key < query.max_first;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (masked) {
          const int32_t at = key + n * 8 + lane % 4 * 2 + i % 2, last = query.last[i / 2];
          if (at > last || (a.window > 0 && at <= last - a.window)) s[n][i] = -INFINITY;
        }
      }
    }
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
      for (int n = 1; n < N; ++n) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      const float top = fmaxf(m[h], ptx::quad_max(most) * unit[h]), base = finite_base(top);
      alpha[h] = ptx::exp2_approx(m[h] - base);
      m[h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = ptx::exp2_approx(fmaf(s[n][i], unit[h], -base));
          sum += s[n][i];
          if constexpr (Traits::FP8) s[n][i] *= v_scale[n][i % 2];
        }
      }
      l[h] = l[h] * alpha[h] + sum;
    }
    // The maximum settles after a few tiles; from then on there is nothing to rescale.
    if (__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        o[j][0] *= alpha[0], o[j][1] *= alpha[0], o[j][2] *= alpha[1], o[j][3] *= alpha[1];
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const float (&x)[4] = s[2 * t], (&y)[4] = s[2 * t + 1];
      const uint32_t p[4] = {ptx::pack2<Mma>(x[0], x[1]), ptx::pack2<Mma>(x[2], x[3]),
                             ptx::pack2<Mma>(y[0], y[1]), ptx::pack2<Mma>(y[2], y[3])};
      add_values(values + t * Traits::kTileBytes, p);
    }
  }

  // FP8: p * v_scale goes through float16, so it is taken relative to a unit near the largest scale
  // seen. Divides `v_scale` by the unit, raising the unit first (rare) if the scales outgrew it.
  template <int N>
  __device__ __forceinline__ void set_v_unit(float (&v_scale)[N][2]) {
    float top = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(v_scale[n][0], v_scale[n][1]));
    top = ptx::quad_max(top);
    if (top > v_unit * 256.0f) {
      // A power of two, so that dividing by it is exact.
      const float unit = __uint_as_float(__float_as_uint(top) & 0x7f800000u);
      const float shrink = unit > 0.0f ? v_unit / unit : 1.0f;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[j][i] *= shrink;
      }
      v_unit = unit, v_inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) v_scale[n][0] *= v_inverse, v_scale[n][1] *= v_inverse;
  }

  // Calls store(column, x, y) with all of this thread's columns, in pairs, of row g + 8 h.
  template <typename Store>
  __device__ __forceinline__ void each_pair(int h, Store store) const {
    if constexpr (!Traits::FP8) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) store(j * 8 + lane % 4 * 2, o[j][2 * h], o[j][2 * h + 1]);
    } else {
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        const int column = j * 16 + lane % 4 * 4;
        store(column, o[2 * j][2 * h], o[2 * j + 1][2 * h]);
        store(column + 2, o[2 * j][2 * h + 1], o[2 * j + 1][2 * h + 1]);
      }
    }
  }

  // Row of the sequence that half h of this thread's fragments belongs to, its sum closed.
  __device__ __forceinline__ void write(const AttentionArgs& a, const Sequence& q, int head,
                                        int row, int h, float sum) const {
    const int token = row / a.group, query_head = head * a.group + row - token * a.group;
    const Closed closed = close_row(a, m[h], sum, query_head);
    const float factor = closed.factor * (Traits::FP8 ? v_unit : 1.0f);
    T* out = static_cast<T*>(a.out) + (q.q_start + token) * a.out_token + query_head * a.out_head;
    each_pair(h, [&](int column, float x, float y) {
      *reinterpret_cast<uint32_t*>(out + column) = ptx::pack2<T>(x * factor, y * factor);
    });
    if (a.lse != nullptr && lane % 4 == 0) {
      a.lse[(q.q_start + token) * a.lse_token + query_head] = closed.lse;
    }
  }
};

}  // namespace torch_pd
