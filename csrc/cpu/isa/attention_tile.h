// Tiles of 64 keys of the paged cache: where they lie, and their two ways into the arithmetic:
// converted into scratch for items of many rows, used as they are loaded for items of few (decode).
#pragma once

#include "../attention.h"
#include "bytes.h"
#include "simd.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

namespace {

// Items of up to kFew rows do without converted tiles.
#if defined(__AVX512F__)
constexpr int kFew = 8;
#elif defined(__AVX2__)
constexpr int kFew = 4;
#else
constexpr int kFew = 2;
#endif
constexpr int kTileVectors = kTileKeys / kLanes;
// Queries and transposed keys are padded with zeros to this width.
constexpr int kPadding = 2 * kLanes;
constexpr float kInfinity = __builtin_inff();

// Scratch of one item and its running state; rows of q, scores and sums in (token, head) order.
struct State {
  float *max, *sum, *rows;  // of the splits merged so far: [n], [n], [n][v_width]
};
State state_at(float* p, int64_t rows) { return {p, p + rows, p + 2 * rows}; }

// Where the keys and values of a tile lie. Keys outside begin .. end, whose scores are masked, have
// the address of one inside, so that loads need no condition.
struct Tile {
  int64_t first;   // position of key 0
  int begin, end;  // keys that some row of the item sees; no others are read
  const char *k[kTileKeys], *v[kTileKeys];
};

struct Work {
  int64_t rows, q_width, v_width;
  float *q, *k_raw, *k, *v, *scores;
  float *lane_sums, *keep, *new_max;
  State split, total;
};

Work lay_out(const AttentionCall& c, int64_t rows, float* p) {
  Work w{rows, round_up(c.k_dim, kPadding), round_up(c.v_dim, kLanes)};
  const auto take = [&](int64_t size) __attribute__((always_inline)) {
    float* at = p;
    p += (size + 15) / 16 * 16;
    return at;
  };
  w.k = take(kTileKeys * w.q_width);
  w.k_raw = take(c.bytes ? kTileKeys * c.k_dim : 0);
  w.v = take(kTileKeys * w.v_width);
  w.q = take(rows * w.q_width);
  w.scores = take(rows * kTileKeys);
  w.lane_sums = take(rows * kLanes);
  w.keep = take(rows);
  w.new_max = take(rows);
  const int64_t size = rows * (2 + w.v_width);
  w.split = state_at(take(size), rows);
  w.total = state_at(take(size), rows);
  return w;
}

// Keys that some row of the item sees and that are in its splits.
struct Keys {
  int64_t begin, end;
};
Keys keys_of(const AttentionCall& c, const AttentionItem& item) {
  const int64_t seen = item.position - c.window + 1, split = int64_t{item.split_begin} * kSplitKeys;
  const int64_t from = c.window && seen > split ? seen : split;
  const int64_t last = item.position + item.tokens, stop = int64_t{item.split_end} * kSplitKeys;
  return {from, last < stop ? last : stop};
}

// The tile of the item that holds key `at` (or starts there).
void locate(const AttentionCall& c, const AttentionItem& item, const Keys& keys, int64_t at,
            Tile& t) {
  t.first = at / kTileKeys * kTileKeys;
  t.begin = keys.begin > t.first ? keys.begin - t.first : 0;
  t.end = keys.end - t.first < kTileKeys ? keys.end - t.first : kTileKeys;
  const int32_t* table = c.block_tables + item.sequence * c.table_stride;
  const int64_t size = c.bytes ? 1 : c.dtype == ScalarType::Float ? 4 : 2;
  const int block = 1 << c.page_shift;
  for (int i = t.begin; i < t.end;) {
    const int64_t key = t.first + i;
    const int32_t entry = table[key >> c.page_shift];
    const int place = static_cast<uint32_t>(entry) >> 28;
    const int64_t page = entry & 0xfffffff;
    int token = key & (block - 1);
    const char* k = c.k[place] + (page * c.k_page + item.kv_head * c.k_head) * size;
    const char* v = c.v[place] + (page * c.v_page + item.kv_head * c.v_head) * size;
    for (; token < block && i < t.end; ++token, ++i) {
      t.k[i] = k + token * c.k_token * size;
      t.v[i] = v + token * c.v_token * size;
    }
  }
  for (int i = 0; i < t.begin; ++i) t.k[i] = t.k[t.begin], t.v[i] = t.v[t.begin];
  for (int i = t.end; i < kTileKeys; ++i) t.k[i] = t.k[t.begin], t.v[i] = t.v[t.begin];
}

void expand_byte_row(const uint8_t* from, int64_t width, bool int8, float scale, float* to) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const int n = width - d < kLanes ? width - d : kLanes;
    VB bytes = {};
    n == kLanes ? __builtin_memcpy(&bytes, from + d, kLanes)
                : __builtin_memcpy(&bytes, from + d, n);
    const VF v = widen_bytes(bytes, int8) * scale;
    n == kLanes ? store(to + d, v) : store_n(to + d, v, n);
  }
}

// Turns a tile of bytes into one of float32 in scratch.
void expand_bytes(const AttentionCall& c, const AttentionItem& item, const Work& w, Tile& t) {
  const int32_t* table = c.block_tables + item.sequence * c.table_stride;
  for (int i = t.begin; i < t.end; ++i) {
    const int64_t key = t.first + i;
    const int32_t entry = table[key >> c.page_shift];
    const int place = static_cast<uint32_t>(entry) >> 28;
    const int64_t page = entry & 0xfffffff, token = key & ((1 << c.page_shift) - 1);
    const float ks = c.k_scale[place][page * c.ks_page + token * c.ks_token + item.kv_head];
    const float vs = c.v_scale[place][page * c.vs_page + token * c.vs_token + item.kv_head];
    float *k = w.k_raw + i * c.k_dim, *v = w.v + i * w.v_width;
    const auto* k8 = reinterpret_cast<const uint8_t*>(t.k[i]);
    const auto* v8 = reinterpret_cast<const uint8_t*>(t.v[i]);
    expand_byte_row(k8, c.k_dim, c.int8, ks, k);
    expand_byte_row(v8, c.v_dim, c.int8, vs, v);
    for (int64_t d = c.v_dim; d < w.v_width; ++d) v[d] = 0;
    t.k[i] = reinterpret_cast<const char*>(k);
    t.v[i] = reinterpret_cast<const char*>(v);
  }
  for (int i = 0; i < t.begin; ++i) t.k[i] = t.k[t.begin];
  for (int i = t.end; i < kTileKeys; ++i) t.k[i] = t.k[t.begin];
}

// Calls use(d, column) for d = 0, 1, 2 ... up to width rounded up to kPadding; column holds element
// d (0 past width) of rows[0 .. kLanes]. ahead: rows whose cache lines are fetched meanwhile.
template <typename T, typename F>
TPD_INLINE void each_column(const char* const* rows, int64_t width, const char* const* ahead,
                            const F& use) {
  // Pairs of bfloat16 are transposed as one word.
  constexpr bool kPairs = __is_same(T, BF16);
  constexpr int kStep = kPairs ? 2 * kLanes : kLanes;
  for (int64_t d = 0; d < width; d += kStep) {
    const int n = width - d < kStep ? width - d : kStep;
    VF v[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* p = reinterpret_cast<const T*>(rows[i]) + d;
      if constexpr (kPairs) {
        v[i] = n == kStep ? load_words(p) : load_words_n(p, n);
      } else {
        v[i] = n == kStep ? load(p) : load_n(p, n);
      }
      if (ahead) __builtin_prefetch(reinterpret_cast<const T*>(ahead[i]) + d, 0, 2);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (kPairs) {
        use(d + 2 * i, bits_of<VF>(bits_of<VI>(v[i]) << 16));
        use(d + 2 * i + 1, bits_of<VF>(bits_of<VI>(v[i]) & splat_int(0xffff0000)));
      } else {
        use(d + i, v[i]);
      }
    }
  }
}

// w.k [k_dim][64], transposed, and w.v [64][v_width].
template <typename T>
void convert_tile(const AttentionCall& c, const Tile& t, const Work& w) {
  for (int lane = t.begin / kLanes * kLanes; lane < t.end; lane += kLanes) {
    float* k = w.k + lane;
    each_column<T>(t.k + lane, c.k_dim, nullptr,
                   [&](int64_t d, VF column)
                       __attribute__((always_inline)) { store(k + d * kTileKeys, column); });
  }
  if (c.bytes) return;  // v is there
  for (int i = t.begin; i < t.end; ++i) {
    const T* v = reinterpret_cast<const T*>(t.v[i]);
    int64_t d = 0;
    for (; d + kLanes <= c.v_dim; d += kLanes) store(w.v + i * w.v_width + d, load(v + d));
    if (d < c.v_dim) store(w.v + i * w.v_width + d, load_n(v + d, c.v_dim - d));
  }
}

// Scores of R rows, keys as they lie. The same sums in the same order as multiply gives.
template <typename T, int R>
void few_scores(const AttentionCall& c, const Tile& t, const Tile* ahead, const Work& w,
                float* scores) {
  for (int lane = t.begin / kLanes * kLanes; lane < t.end; lane += kLanes) {
    VF acc[R] = {};
    each_column<T>(t.k + lane, c.k_dim, ahead ? ahead->k + lane : nullptr,
                   [&](int64_t d, VF column) __attribute__((always_inline)) {
                     for (int r = 0; r < R; ++r) {
                       acc[r] = fma(splat(w.q[r * w.q_width + d]), column, acc[r]);
                     }
                   });
    for (int r = 0; r < R; ++r) store(scores + r * kTileKeys + lane, acc[r]);
  }
}

// rows [R][v_width] = keep * rows + probabilities * values as they lie.
template <typename T, int R, int N>
void few_values_part(const Tile& t, const Tile* ahead, const Work& w, const float* p, int64_t d,
                     int tail) {
  VF acc[R][N];
  float* rows = w.split.rows + d;
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) {
      acc[r][j] = load(rows + r * w.v_width + j * kLanes) * splat(w.keep[r]);
    }
  }
  for (int i = t.begin; i < t.end; ++i) {
    const T* v = reinterpret_cast<const T*>(t.v[i]) + d;
    VF x[N];
    for (int j = 0; j < N; ++j) x[j] = tail ? load_n(v, tail) : load(v + j * kLanes);
    if (ahead) {
      const T* next = reinterpret_cast<const T*>(ahead->v[i]) + d;
      for (int j = 0; j < N; j += 64 / (kLanes * sizeof(T))) {  // one per cache line
        __builtin_prefetch(next + j * kLanes, 0, 2);
      }
    }
    for (int r = 0; r < R; ++r) {
      const VF weight = splat(p[r * kTileKeys + i]);
      for (int j = 0; j < N; ++j) acc[r][j] = fma(weight, x[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) store(rows + r * w.v_width + j * kLanes, acc[r][j]);
  }
}

template <typename T, int R>
void few_values(const AttentionCall& c, const Tile& t, const Tile* ahead, const Work& w,
                const float* p) {
  constexpr int kGroup = kFew == 8 && R <= 5 ? 4 : 2;
  int64_t d = 0;
  for (; d + kGroup * kLanes <= c.v_dim; d += kGroup * kLanes) {
    few_values_part<T, R, kGroup>(t, ahead, w, p, d, 0);
  }
  for (; d < c.v_dim; d += kLanes) {
    const int64_t left = c.v_dim - d;
    few_values_part<T, R, 1>(t, ahead, w, p, d, left < kLanes ? left : 0);
  }
}

// Fetches rows of the next tile that have no counterpart in this one.
void fetch_rows(const char* const* rows, int begin, int end, int64_t bytes) {
  for (int i = begin; i < end; ++i) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(rows[i] + b, 0, 2);
  }
}

}  // namespace

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
