// linear: every output is one chain of fused multiply-adds over k = 0, 1, 2 ... in float32, in
// whatever lane, tile or kernel it is computed. So a row does not depend on the rows beside it.
//
// Two kernels. Panels: lanes are rows of x (packed transposed), weights are broadcast, so weights
// are read as they lie and nothing is reduced across lanes. A panel costs the same however few of
// its lanes are used, so up to kFew left-over rows take the other kernel: lanes are weight rows,
// transposed in registers, x is broadcast.
#include "../linear.h"

#include "simd.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

namespace {

// Register tile: 2 vectors of x by kTile weight rows; epilogues transpose kTile <= kLanes vectors.
#if defined(__AVX512F__)
constexpr int kTile = 12;
#elif defined(__AVX2__)
constexpr int kTile = 6;
#else
constexpr int kTile = 4;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int kFew = kLanes / 2;
// A tile's weights (kTile rows of kDepth) stay in L1 while all panels pass.
constexpr int kDepth = 768;  // and up to 16 more
constexpr int kMaxPanels = 512 / kPanel;
static_assert(kLinearBlock % kTile == 0 && kLinearBlock % kLanes == 0 && kTile <= kLanes);

// Rows = panels of kPanel, then at most one panel of kLanes, then at most kFew single rows.
struct Split {
  int64_t wide, half, few;
};
Split split_rows(int64_t rows) {
  Split s{rows / kPanel, 0, rows % kPanel};
  if (s.few > kLanes + kFew) {
    s.wide += 1, s.few = 0;
  } else if (s.few > kFew) {
    s.half = 1, s.few = s.few > kLanes ? s.few - kLanes : 0;
  }
  return s;
}

template <typename T>
void pack_panel(const T* x, int64_t x_row, int64_t rows, int64_t k_begin, int64_t k_end, int width,
                float* packed) {
  for (int lane = 0; lane < width; lane += kLanes) {
    for (int64_t k = k_begin; k < k_end; k += kLanes) {
      const int n = k_end - k < kLanes ? k_end - k : kLanes;
      VF v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (lane + i >= rows) {
          v[i] = VF{};
        } else {
          const T* p = x + (lane + i) * x_row + k;
          v[i] = n == kLanes ? load(p) : load_n(p, n);
        }
      }
      transpose(v);
      for (int i = 0; i < n; ++i) store(packed + (k + i) * width + lane, v[i]);
    }
  }
}

template <typename T>
void pack(const LinearRows& p, int64_t k_begin, int64_t k_end) {
  const Split s = split_rows(p.rows);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t i = 0; i < s.wide + s.half; ++i) {
    const int64_t row = i * kPanel;
    pack_panel(x + row * p.x_row, p.x_row, p.rows - row, k_begin, k_end,
               i < s.wide ? kPanel : kLanes, p.packed + row * p.in);
  }
  for (int64_t row = p.rows - s.few; row < p.rows; ++row) {
    for (int64_t k = k_begin; k < k_end; ++k) {
      p.packed[row * p.in + k] = to_float(x[row * p.x_row + k]);
    }
  }
}

// The same lines of the weights that are needed next, fetched in the shadow of the arithmetic.
struct Ahead {
  const char* p;      // null: nothing
  int64_t row, step;  // bytes
};

// sums [kTile][X * kLanes] += weight rows * panel, over `depth` values of k.
template <int X>
void tile(const float* x, const float* w, int64_t w_row, int64_t depth, bool first, float* sums,
          Ahead ahead) {
  VF acc[kTile][X];
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < X; ++j) {
      acc[i][j] = first ? VF{} : load(sums + (i * X + j) * kLanes);
    }
  }
  const auto step = [&](const float* xk, const float* wk) __attribute__((always_inline)) {
    VF xv[X];
    for (int j = 0; j < X; ++j) xv[j] = load(xk + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kTile; ++i) {
      const VF b = splat(wk[i * w_row]);
      for (int j = 0; j < X; ++j) acc[i][j] = fma(b, xv[j], acc[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    if (ahead.p) {
      for (int i = 0; i < kTile; ++i) __builtin_prefetch(ahead.p + i * ahead.row, 0, 2);
      ahead.p += ahead.step;
    }
    for (int u = 0; u < 16; ++u) step(x + (k + u) * X * kLanes, w + k + u);
  }
  for (; k < depth; ++k) step(x + k * X * kLanes, w + k);
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < X; ++j) store(sums + (i * X + j) * kLanes, acc[i][j]);
  }
}

// out[row .. row + rows][n .. n + count] = transposed sums [kTile][width] + bias.
template <typename T>
void finish(const LinearRows& p, const float* sums, int width, int64_t row, int64_t rows, int64_t n,
            int count) {
  const VF bias = p.bias ? load_n(static_cast<const T*>(p.bias) + n, count) : VF{};
  for (int lane = 0; lane < width && lane < rows; lane += kLanes) {
    VF v[kLanes] = {};
    for (int i = 0; i < kTile; ++i) v[i] = load(sums + i * width + lane);
    transpose(v);
    T* out = static_cast<T*>(p.out) + (row + lane) * p.out_row + n;
    for (int i = 0; i < kLanes && lane + i < rows; ++i) {
      store_n(out + i * p.out_row, p.bias ? v[i] + bias : v[i], count);
    }
  }
}

// Weight rows n .. n + count, count <= kTile, against all panels.
template <typename T>
void panels(const LinearRows& p, const Split& s, int64_t n, int count) {
  constexpr bool kIsFloat = sizeof(T) == sizeof(float);
  const T* w = static_cast<const T*>(p.weight) + n * p.weight_row;
  const int64_t parts = p.in > kDepth ? (p.in + kDepth - 1) / kDepth : 1;
  const int64_t depth = (p.in / parts / 16 + 1) * 16;
  // Rows that lie a multiple of 4 KiB apart would share one set of L1, and with several panels the
  // copy pays for itself: measured 250 instead of 175 GFLOP/s at 512 rows.
  const bool copy = !kIsFloat || count < kTile || p.weight_row % 1024 == 0 || s.wide + s.half >= 4;
  alignas(64) float sums[kMaxPanels + 1][kTile * kPanel];
  alignas(64) float copied[kTile * (kDepth + 16)];
  for (int64_t k0 = 0; k0 == 0 || k0 < p.in; k0 += depth) {  // once at least: sums of nothing are 0
    const int64_t kn = p.in - k0 < depth ? p.in - k0 : depth;
    if (copy) {
      for (int i = 0; i < kTile; ++i) {
        const T* from = w + (i < count ? i : 0) * p.weight_row + k0;
        float* to = copied + i * (kDepth + 16);
        int64_t k = 0;
        for (; k + kLanes <= kn; k += kLanes) store(to + k, load(from + k));
        if (k < kn) store(to + k, load_n(from + k, kn - k));
      }
    }
    const float* rows = copy ? copied : reinterpret_cast<const float*>(w) + k0;
    const int64_t row_stride = copy ? kDepth + 16 : p.weight_row;
    // Next in order of use: the same rows further on, else the next rows.
    const T* next = k0 + kn < p.in ? w + k0 + kn : w + kTile * p.weight_row;
    const bool any = k0 + kn < p.in || n + 2 * kTile <= p.out_features;
    Ahead ahead{any ? reinterpret_cast<const char*>(next) : nullptr,
                p.weight_row * int64_t(sizeof(T)), 16 * int64_t(sizeof(T))};
    for (int64_t i = 0; i < s.wide + s.half; ++i, ahead.p = nullptr) {
      const float* x = p.packed + i * kPanel * p.in;
      if (i < s.wide) {
        tile<2>(x + k0 * kPanel, rows, row_stride, kn, k0 == 0, sums[i], ahead);
      } else {
        tile<1>(x + k0 * kLanes, rows, row_stride, kn, k0 == 0, sums[i], ahead);
      }
    }
  }
  for (int64_t i = 0; i < s.wide + s.half; ++i) {
    finish<T>(p, sums[i], i < s.wide ? kPanel : kLanes, i * kPanel, p.rows - s.few - i * kPanel, n,
              count);
  }
}

// Weight rows n .. n + count, count <= kLanes, against R rows of x.
template <typename T, int R>
void few_rows(const LinearRows& p, int64_t n, int count) {
  const int64_t row0 = p.rows - R;
  const T* w = static_cast<const T*>(p.weight) + n * p.weight_row;
  const bool ahead = n + 2 * kLanes <= p.out_features;
  VF acc[R] = {};
  for (int64_t k = 0; k < p.in; k += kLanes) {
    const int kn = p.in - k < kLanes ? p.in - k : kLanes;
    VF v[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* from = w + (i < count ? i : 0) * p.weight_row + k;
      v[i] = kn == kLanes ? load(from) : load_n(from, kn);
      if (ahead) __builtin_prefetch(from + kLanes * p.weight_row, 0, 2);
    }
    transpose(v);
    const float* x = p.packed + row0 * p.in + k;
    const auto step = [&](int u) __attribute__((always_inline)) {
      for (int r = 0; r < R; ++r) acc[r] = fma(v[u], splat(x[r * p.in + u]), acc[r]);
    };
    if (kn == kLanes) {
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u) step(u);
    } else {
      for (int u = 0; u < kn; ++u) step(u);
    }
  }
  T* out = static_cast<T*>(p.out) + row0 * p.out_row + n;
  const VF bias = p.bias ? load_n(static_cast<const T*>(p.bias) + n, count) : VF{};
  for (int r = 0; r < R; ++r) {
    store_n(out + r * p.out_row, p.bias ? acc[r] + bias : acc[r], count);
  }
}

template <typename T, int R = kFew>
void few(const LinearRows& p, int64_t rows, int64_t n, int count) {
  if constexpr (R > 0) {
    if (rows == R) {
      few_rows<T, R>(p, n, count);
    } else {
      few<T, R - 1>(p, rows, n, count);
    }
  }
}

template <typename T>
void blocks(const LinearRows& p, int64_t begin, int64_t end) {
  const Split s = split_rows(p.rows);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLinearBlock;
    const int64_t last =
        first + kLinearBlock < p.out_features ? first + kLinearBlock : p.out_features;
    if (s.wide + s.half > 0) {
      for (int64_t n = first; n < last; n += kTile) {
        panels<T>(p, s, n, last - n < kTile ? last - n : kTile);
      }
    }
    if (s.few > 0) {
      for (int64_t n = first; n < last; n += kLanes) {
        few<T>(p, s.few, n, last - n < kLanes ? last - n : kLanes);
      }
    }
  }
}

}  // namespace

void linear_pack(const LinearRows& p, int64_t k_begin, int64_t k_end) {
  switch (p.dtype) {
    case ScalarType::Float: return pack<float>(p, k_begin, k_end);
    case ScalarType::BFloat16: return pack<BF16>(p, k_begin, k_end);
    default: return pack<F16>(p, k_begin, k_end);
  }
}

void linear_blocks(const LinearRows& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case ScalarType::Float: return blocks<float>(p, begin, end);
    case ScalarType::BFloat16: return blocks<BF16>(p, begin, end);
    default: return blocks<F16>(p, begin, end);
  }
}

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
