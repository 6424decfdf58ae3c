// linear: every output is one chain of multiply-adds over words k = 0, 1, 2 ... in float32, in
// whatever lane, tile or kernel it is computed. So a row does not depend on the rows beside it.
//
// A word is what one lane multiplies at once: an element as float32, or two bfloat16 as they lie
// where the set multiplies pairs (twice the rate, half the bytes of x). Lengths below are in words.
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

// Register tile: 2 vectors of x by kTile weight rows; sums are kept of a whole block.
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
constexpr int kDepth = 768;  // words, and up to 16 more
constexpr int kMaxPanels = 512 / kPanel;
static_assert(kLinearBlock % kTile == 0 && kLinearBlock % kLanes == 0);

#if defined(__AVX512BF16__)
template <typename T>
constexpr int kPairs = __is_same(T, BF16);
#else
template <typename T>
constexpr int kPairs = 0;
#endif
template <typename T>
constexpr int kWord = 1 + kPairs<T>;  // elements

template <typename T>
TPD_INLINE int64_t words(int64_t elements) {
  return (elements + kWord<T> - 1) / kWord<T>;
}

// The next kLanes words, or those of the first n elements and then zeros.
template <typename T>
TPD_INLINE VF load_words_of(const T* p) {
  if constexpr (kPairs<T>) {
    return load_words(p);
  } else {
    return load(p);
  }
}
template <typename T>
TPD_INLINE VF load_words_of(const T* p, int64_t n) {
  if (n >= kLanes * kWord<T>) return load_words_of(p);
  if constexpr (kPairs<T>) {
    return load_words_n(p, n);
  } else {
    return load_n(p, n);
  }
}

// word * x + sum in every lane; `word` points to one word, which need not be aligned.
template <typename T>
TPD_INLINE VF splat_word(const float* word) {
  if constexpr (kPairs<T>) {
    int32_t bits;
    __builtin_memcpy(&bits, word, sizeof(bits));
    return bits_of<VF>(splat_int(bits));
  } else {
    return splat(*word);
  }
}
template <typename T>
TPD_INLINE VF multiply_add(VF word, VF x, VF sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(word), bits_of<__m512bh>(x));
  }
#endif
  return fma(word, x, sum);
}

// Rows = panels of kPanel, then at most one panel of kLanes, then at most kFew single rows.
struct Split {
  int64_t wide, half, few;
};
Split split_rows(int64_t rows) {
  Split s{rows / kPanel, 0, rows % kPanel};
  if (s.few > kLanes + kFew / 2) {  // measured: from here on a whole panel takes less time
    s.wide += 1, s.few = 0;
  } else if (s.few > kFew) {
    s.half = 1, s.few = s.few > kLanes ? s.few - kLanes : 0;
  }
  return s;
}

// Packs elements k_begin .. k_end of rows beside each other: packed[word][row].
template <typename T>
void pack_panel(const T* x, int64_t x_row, int64_t rows, int64_t k_begin, int64_t k_end, int width,
                float* packed) {
  constexpr int kStep = kLanes * kWord<T>;
  for (int lane = 0; lane < width; lane += kLanes) {
    for (int64_t k = k_begin; k < k_end; k += kStep) {
      VF v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        v[i] = lane + i < rows ? load_words_of(x + (lane + i) * x_row + k, k_end - k) : VF{};
      }
      transpose(v);
      const int64_t n = k_end - k < kStep ? words<T>(k_end - k) : kLanes;
      float* to = packed + k / kWord<T> * width + lane;
      for (int i = 0; i < n; ++i) store(to + i * width, v[i]);
    }
  }
}

template <typename T>
void pack(const LinearRows& p, int64_t k_begin, int64_t k_end) {
  const Split s = split_rows(p.rows);
  const T* x = static_cast<const T*>(p.x);
  const int64_t depth = words<T>(p.in);
  for (int64_t i = 0; i < s.wide + s.half; ++i) {
    const int64_t row = i * kPanel;
    pack_panel(x + row * p.x_row, p.x_row, p.rows - row, k_begin, k_end,
               i < s.wide ? kPanel : kLanes, p.packed + row * depth);
  }
  for (int64_t row = p.rows - s.few; row < p.rows; ++row) {
    float* to = p.packed + row * depth;
    for (int64_t k = k_begin; k < k_end; k += kLanes * kWord<T>) {
      const VF v = load_words_of(x + row * p.x_row + k, k_end - k);
      const int64_t n = words<T>(k_end - k);
      n < kLanes ? store_n(to + k / kWord<T>, v, n) : store(to + k / kWord<T>, v);
    }
  }
}

// The same lines of the weights that are needed next, fetched in the shadow of the arithmetic.
struct Ahead {
  const char* p;      // null: nothing
  int64_t row, step;  // bytes
};

// sums [kTile][X * kLanes] += weight rows * panel, over `depth` words.
template <typename T, int X>
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
      const VF b = splat_word<T>(wk + i * w_row);
      for (int j = 0; j < X; ++j) acc[i][j] = multiply_add<T>(b, xv[j], acc[i][j]);
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

// out[row .. row + rows][n .. n + count] = transposed sums [kLinearBlock][width] + bias.
template <typename T>
void finish(const LinearRows& p, const float* sums, int width, int64_t row, int64_t rows, int64_t n,
            int count) {
  const int all = rows < width ? rows : width;
  for (int first = 0; first < count; first += kLanes) {
    const int columns = count - first < kLanes ? count - first : kLanes;
    const VF bias = p.bias ? load_n(static_cast<const T*>(p.bias) + n + first, columns) : VF{};
    for (int lane = 0; lane < all; lane += kLanes) {
      VF v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        v[i] = i < columns ? load(sums + (first + i) * width + lane) : VF{};
      }
      transpose(v);
      T* out = static_cast<T*>(p.out) + (row + lane) * p.out_row + n + first;
      for (int i = 0; i < kLanes && lane + i < all; ++i) {
        const VF value = p.bias ? v[i] + bias : v[i];
        columns == kLanes ? store(out + i * p.out_row, value)
                          : store_n(out + i * p.out_row, value, columns);
      }
    }
  }
}

// sums[i][column ..][width] of all panels = weight rows n .. n + count, count <= kTile.
// Not inlined: registers are dealt out better in functions of their own.
template <typename T>
__attribute__((noinline)) void panels(const LinearRows& p, const Split& s, int64_t n, int count,
                                      int column, float (*sums)[kLinearBlock * kPanel]) {
  constexpr bool kAsTheyLie = kPairs<T> || __is_same(T, float);
  const T* w = static_cast<const T*>(p.weight) + n * p.weight_row;
  const int64_t all = words<T>(p.in);
  const int64_t parts = all > kDepth ? (all + kDepth - 1) / kDepth : 1;
  const int64_t depth = (all / parts / 16 + 1) * 16;
  // Rows that lie a multiple of 4 KiB apart would share one set of L1, and with several panels the
  // copy pays for itself: measured 250 instead of 175 GFLOP/s at 512 rows of float32.
  const bool copy = !kAsTheyLie || count < kTile || s.wide + s.half >= 4 ||
                    p.weight_row * int64_t(sizeof(T)) % 4096 == 0 || p.in % kWord<T> != 0 ||
                    p.weight_row % kWord<T> != 0;
  alignas(64) float copied[kTile * (kDepth + 16)];
  for (int64_t k0 = 0; k0 == 0 || k0 < all; k0 += depth) {  // once at least: sums of nothing are 0
    const int64_t kn = all - k0 < depth ? all - k0 : depth;
    const T* part = w + k0 * kWord<T>;
    if (copy) {
      const int64_t elements = p.in - k0 * kWord<T>;
      for (int i = 0; i < kTile; ++i) {
        const T* from = part + (i < count ? i : 0) * p.weight_row;
        float* to = copied + i * (kDepth + 16);
        for (int64_t k = 0; k < kn; k += kLanes) {
          store(to + k, load_words_of(from + k * kWord<T>, elements - k * kWord<T>));
        }
      }
    }
    const float* rows = copy ? copied : reinterpret_cast<const float*>(part);
    const int64_t row_stride = copy ? kDepth + 16 : p.weight_row / kWord<T>;
    // Next in order of use: the same rows further on, else the next rows.
    const T* next = k0 + kn < all ? part + kn * kWord<T> : w + kTile * p.weight_row;
    const bool any = k0 + kn < all || n + 2 * kTile <= p.out_features;
    Ahead ahead{any ? reinterpret_cast<const char*>(next) : nullptr,
                p.weight_row * int64_t(sizeof(T)), 16 * kWord<T> * int64_t(sizeof(T))};
    for (int64_t i = 0; i < s.wide + s.half; ++i, ahead.p = nullptr) {
      const float* x = p.packed + i * kPanel * all;
      if (i < s.wide) {
        tile<T, 2>(x + k0 * kPanel, rows, row_stride, kn, k0 == 0, sums[i] + column * kPanel,
                   ahead);
      } else {
        tile<T, 1>(x + k0 * kLanes, rows, row_stride, kn, k0 == 0, sums[i] + column * kLanes,
                   ahead);
      }
    }
  }
}

// Weight rows n .. n + count, count <= kLanes, against R rows of x.
template <typename T, int R>
__attribute__((noinline)) void few_rows(const LinearRows& p, int64_t n, int count) {
  constexpr int kStep = kLanes * kWord<T>;
  const int64_t row0 = p.rows - R, all = words<T>(p.in);
  const T* w = static_cast<const T*>(p.weight) + n * p.weight_row;
  const bool ahead = n + 2 * kLanes <= p.out_features;
  VF acc[R] = {};
  for (int64_t k = 0; k < p.in; k += kStep) {
    const int64_t rest = p.in - k;
    VF v[kLanes];
    const T* from = w + k;
    if (rest >= kStep && count == kLanes) {
      for (int i = 0; i < kLanes; ++i, from += p.weight_row) {
        v[i] = load_words_of(from);
        if (ahead) __builtin_prefetch(from + kLanes * p.weight_row, 0, 2);
      }
    } else {
      for (int i = 0; i < count; ++i) v[i] = load_words_of(from + i * p.weight_row, rest);
      for (int i = count; i < kLanes; ++i) v[i] = VF{};
    }
    transpose(v);
    const float* x = p.packed + row0 * all + k / kWord<T>;
    const auto step = [&](int u) __attribute__((always_inline)) {
      for (int r = 0; r < R; ++r) {
        acc[r] = multiply_add<T>(v[u], splat_word<T>(x + r * all + u), acc[r]);
      }
    };
    if (rest >= kStep) {
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u) step(u);
    } else {
      for (int u = 0; u < words<T>(rest); ++u) step(u);
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
  // Of a whole block, so that outputs are written in whole cache lines.
  alignas(64) float sums[kMaxPanels + 1][kLinearBlock * kPanel];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLinearBlock;
    const int64_t last =
        first + kLinearBlock < p.out_features ? first + kLinearBlock : p.out_features;
    if (s.wide + s.half > 0) {
      for (int64_t n = first; n < last; n += kTile) {
        panels<T>(p, s, n, last - n < kTile ? last - n : kTile, n - first, sums);
      }
      for (int64_t i = 0; i < s.wide + s.half; ++i) {
        finish<T>(p, sums[i], i < s.wide ? kPanel : kLanes, i * kPanel, p.rows - s.few - i * kPanel,
                  first, last - first);
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
