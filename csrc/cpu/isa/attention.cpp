// Paged attention: online softmax over tiles of 64 keys (Milakov and Gimelshein 2018; tiles as in
// FlashAttention, Dao et al. 2022). Rows of an item are (token, query head) pairs that share one KV
// head, so each tile of K and V is fetched and converted once for all of them.
#include "../attention.h"

#include "simd.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

namespace {

// Register tile: kRows rows by kVectors vectors. Items of up to kFew rows (a decode) do without
// converted tiles: each key and value is used as it is loaded.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4, kFew = 8;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2, kFew = 4;
#else
constexpr int kRows = 4, kVectors = 2, kFew = 2;
#endif
constexpr int kTileVectors = kTileKeys / kLanes;
// Queries and transposed keys are padded with zeros to this width.
constexpr int kPadding = 2 * kLanes;
constexpr float kInfinity = __builtin_inff();

// --- c [rows, vectors] = a [rows, depth] b [depth, vectors] (+ keep[row] * c) ---

template <int R, int N>
void multiply_tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                   const float* keep, float* c, int64_t c_row) {
  VF acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) {
      acc[r][j] = keep ? load(c + r * c_row + j * kLanes) * splat(keep[r]) : VF{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    VF bv[N];
    for (int j = 0; j < N; ++j) bv[j] = load(b + k * b_row + j * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const VF av = splat(a[r * a_row + k]);
      for (int j = 0; j < N; ++j) acc[r][j] = fma(av, bv[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) store(c + r * c_row + j * kLanes, acc[r][j]);
  }
}

template <int N, int R = kRows>
void multiply_rows(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row,
                   int64_t depth, const float* keep, float* c, int64_t c_row) {
  if constexpr (R > 0) {
    for (; rows >= R; rows -= R, a += R * a_row, c += R * c_row) {
      multiply_tile<R, N>(a, a_row, b, b_row, depth, keep, c, c_row);
      if (keep) keep += R;
    }
    if (rows > 0) multiply_rows<N, R - 1>(rows, a, a_row, b, b_row, depth, keep, c, c_row);
  }
}

void multiply(int64_t rows, int64_t vectors, const float* a, int64_t a_row, const float* b,
              int64_t b_row, int64_t depth, const float* keep, float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + kVectors <= vectors; j += kVectors) {
    multiply_rows<kVectors>(rows, a, a_row, b + j * kLanes, b_row, depth, keep, c + j * kLanes,
                            c_row);
  }
  for (; j < vectors; ++j) {
    multiply_rows<1>(rows, a, a_row, b + j * kLanes, b_row, depth, keep, c + j * kLanes, c_row);
  }
}

// --- elementwise ---

// exp(x) for x <= 88; 0 below -87.3; 1 for 0 exactly; NaN stays NaN. About 1 ulp.
VF exp(VF x) {
  const VF shifted = fma(x, splat(1.44269504f), splat(0x1.8p23f));  // integer in the low bits
  const VF n = shifted - 0x1.8p23f;
  VF r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  VF p = splat(1.9875691500e-4f);  // Cephes expf
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const VF power = bits_of<VF>((bits_of<VI>(shifted) << 23) + (127 << 23));
  return x < -87.3f ? VF{} : p * power;
}

VF tanh(VF x) {
  const VF size = x < 0.0f ? -x : x;
  const VF big = size > 20.0f ? splat(20.0f) : size;  // keeps NaN
  const VF far = 1.0f - 2.0f / (exp(big + big) + 1.0f);
  const VF z = x * x;
  VF p = splat(-5.70498872745e-3f);  // Cephes tanhf
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const VF near = fma(p * z, x, x);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

float max_lane(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

float add_lanes(VF v) {
  float s = v[0];
  for (int i = 1; i < kLanes; ++i) s += v[i];
  return s;
}

float exp_one(float x) { return exp(splat(x))[0]; }

// --- tiles of K and V ---

struct Float8Table {
  float value[256];
};
constexpr Float8Table make_float8_table() {  // e4m3fn: bias 7, no infinity, NaN = 0x7f, 0xff
  Float8Table t{};
  for (int i = 0; i < 256; ++i) {
    const int exponent = i >> 3 & 15, mantissa = i & 7;
    float v = exponent ? 8.0f + mantissa : mantissa;  // units of 2^-10, times 2^exponent
    for (int e = exponent ? exponent : 1; e > 0; --e) v *= 2.0f;
    t.value[i] = (i & 0x7f) == 0x7f ? __builtin_nanf("") : (i & 0x80 ? -v : v) * 0x1p-10f;
  }
  return t;
}
constexpr Float8Table kFloat8 = make_float8_table();

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
  w.k_raw = take(c.float8 ? kTileKeys * c.k_dim : 0);
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
  const int64_t size = c.float8 ? 1 : c.dtype == ScalarType::Float ? 4 : 2;
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

// Turns a tile of float8 into one of float32 in scratch.
void expand_float8(const AttentionCall& c, const AttentionItem& item, const Work& w, Tile& t) {
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
    for (int64_t d = 0; d < c.k_dim; ++d) k[d] = kFloat8.value[k8[d]] * ks;
    for (int64_t d = 0; d < c.v_dim; ++d) v[d] = kFloat8.value[v8[d]] * vs;
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
  if (c.float8) return;  // v is there
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
      for (int j = 0; j < N; ++j) __builtin_prefetch(next + j * kLanes, 0, 2);
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

// --- one split ---

// Scores become probabilities relative to the new maxima of rows begin .. end; keep: what the sums
// so far are worth relative to them.
void softmax_tile(const AttentionCall& c, const AttentionItem& item, const Tile& t,
                  int64_t row_begin, int64_t row_end, const Work& w) {
  VI lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t position = item.position + r / c.group - t.first;  // in this tile
    const int last = position < t.end ? position + 1 : t.end;
    const int64_t oldest = c.window ? position - c.window + 1 : t.begin;
    const int from = oldest > t.begin ? oldest : t.begin;
    float* s = w.scores + r * kTileKeys;
    VF most = splat(-kInfinity);
    for (int j = 0; j < kTileVectors; ++j) {
      VF v = load(s + j * kLanes);
      if (c.soft_cap > 0) v = tanh(v / c.soft_cap) * c.soft_cap;
      const VI key = lanes + j * kLanes;
      v = (key >= from) & (key < last) ? v : splat(-kInfinity);
      store(s + j * kLanes, v);
      most = max(v, most);
    }
    const float tile_max = max_lane(most);
    w.new_max[r] = tile_max > w.split.max[r] ? tile_max : w.split.max[r];
  }
  for (int64_t r = row_begin; r < row_end; r += kLanes) {
    const int n = row_end - r < kLanes ? row_end - r : kLanes;
    const VF old = load_n(w.split.max + r, n), now = load_n(w.new_max + r, n);
    store_n(w.split.max + r, now, n);
    const VF base = now == -kInfinity ? VF{} : now;  // only scores of -inf so far
    store_n(w.keep + r, exp(old - base), n);
    store_n(w.new_max + r, base, n);
  }
  for (int64_t r = row_begin; r < row_end; ++r) {
    float* s = w.scores + r * kTileKeys;
    const VF base = splat(w.new_max[r]);
    VF sum = load(w.lane_sums + r * kLanes) * splat(w.keep[r]);
    for (int j = 0; j < kTileVectors; ++j) {
      const VF p = exp(load(s + j * kLanes) - base);
      store(s + j * kLanes, p);
      sum += p;
    }
    store(w.lane_sums + r * kLanes, sum);
  }
}

template <typename T, int R = kFew>
void run_few(const AttentionCall& c, const AttentionItem& item, const Tile& t, const Tile* ahead,
             const Work& w) {
  if constexpr (R > 0) {
    if (w.rows != R) return run_few<T, R - 1>(c, item, t, ahead, w);
    few_scores<T, R>(c, t, ahead, w, w.scores);
    softmax_tile(c, item, t, 0, R, w);
    few_values<T, R>(c, t, ahead, w, w.scores);
  }
}

template <typename T>
void run_many(const AttentionCall& c, const AttentionItem& item, const Tile& t, const Work& w) {
  // Tokens that see some key of the tile.
  const int64_t early = t.first + t.begin - item.position;
  const int64_t late = t.first + t.end - 1 + c.window - item.position;
  const int64_t r0 = (early > 0 ? early : 0) * c.group;
  const int64_t r1 = (c.window && late < item.tokens ? late : item.tokens) * c.group;
  float* scores = w.scores + r0 * kTileKeys;
  convert_tile<T>(c, t, w);
  multiply(r1 - r0, kTileVectors, w.q + r0 * w.q_width, w.q_width, w.k, kTileKeys, c.k_dim, nullptr,
           scores, kTileKeys);
  softmax_tile(c, item, t, r0, r1, w);
  multiply(r1 - r0, w.v_width / kLanes, scores + t.begin, kTileKeys, w.v + t.begin * w.v_width,
           w.v_width, t.end - t.begin, w.keep + r0, w.split.rows + r0 * w.v_width, w.v_width);
}

// One split of the item. `now` is its first tile; afterwards `now` is the tile behind it, if the
// item has one. While a tile is worked on, the one behind it is fetched.
template <typename T>
void run_split(const AttentionCall& c, const AttentionItem& item, const Keys& keys, int64_t split,
               const AttentionItem* next, const Work& w, Tile*& now, Tile*& then) {
  for (int64_t r = 0; r < w.rows; ++r) w.split.max[r] = -kInfinity;
  for (int64_t i = 0; i < w.rows * kLanes; ++i) w.lane_sums[i] = 0;
  for (int64_t i = 0; i < w.rows * w.v_width; ++i) w.split.rows[i] = 0;
  while (now->first < keys.end && now->first < (split + 1) * kSplitKeys) {
    const Tile* ahead = nullptr;
    if (now->first + kTileKeys < keys.end) {
      locate(c, item, keys, now->first + kTileKeys, *then);
      ahead = then;
    } else if (next) {
      const Keys next_keys = keys_of(c, *next);
      locate(c, *next, next_keys, next_keys.begin, *then);
      ahead = then;
    }
    if (c.float8) {
      expand_float8(c, item, w, *now);
      ahead = nullptr;
    }
    w.rows <= kFew ? run_few<T>(c, item, *now, ahead, w) : run_many<T>(c, item, *now, w);
    if (now->first + kTileKeys >= keys.end) break;
    Tile* const done = now;
    now = then, then = done;
  }
  for (int64_t r = 0; r < w.rows; ++r) w.split.sum[r] = add_lanes(load(w.lane_sums + r * kLanes));
}

// --- merge and output ---

void clear(const State& total, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) total.max[r] = -kInfinity, total.sum[r] = 0;
  for (int64_t i = 0; i < rows * width; ++i) total.rows[i] = 0;
}

// Not inlined: every caller must get the same contractions into fused multiply-adds.
__attribute__((noinline)) void merge(const State& total, const State& split, int64_t rows,
                                     int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    if (split.max[r] == -kInfinity && split.sum[r] == 0) continue;  // saw no key
    const float most = split.max[r] > total.max[r] ? split.max[r] : total.max[r];
    const float a = exp_one(total.max[r] - most), b = exp_one(split.max[r] - most);
    total.max[r] = most;
    total.sum[r] = total.sum[r] * a + split.sum[r] * b;
    float *to = total.rows + r * width, *from = split.rows + r * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      store(to + d, load(to + d) * splat(a) + load(from + d) * splat(b));
    }
  }
}

template <typename T>
void write_out(const AttentionCall& c, const AttentionItem& item, const State& total,
               int64_t width) {
  for (int64_t r = 0; r < item.tokens * c.group; ++r) {
    const int64_t token = item.token + r / c.group;
    const int64_t head = item.kv_head * c.group + r % c.group;
    float most = total.max[r], sum = total.sum[r], factor = 1;
    if (c.sinks) {
      most = c.sinks[head] > most ? c.sinks[head] : most;
      factor = most == -kInfinity ? 1 : exp_one(total.max[r] - most);
      sum = sum * factor + (most == -kInfinity ? 0 : exp_one(c.sinks[head] - most));
    }
    // A row all of whose scores are -inf has no weights: zero, as merge_attention expects.
    const VF norm = splat(sum == 0 ? 0 : factor / sum);
    T* out = static_cast<T*>(c.out) + token * c.out_token + head * c.out_head;
    const float* row = total.rows + r * width;
    int64_t d = 0;
    for (; d + kLanes <= c.v_dim; d += kLanes) store(out + d, load(row + d) * norm);
    if (d < c.v_dim) store_n(out + d, load(row + d) * norm, c.v_dim - d);
    if (c.lse)
      c.lse[token * c.lse_token + head] = sum == 0 ? -kInfinity : most + __builtin_logf(sum);
  }
}

void finish(const AttentionCall& c, const AttentionItem& item, const State& total, int64_t width) {
  switch (c.dtype) {
    case ScalarType::Float: return write_out<float>(c, item, total, width);
    case ScalarType::BFloat16: return write_out<BF16>(c, item, total, width);
    default: return write_out<F16>(c, item, total, width);
  }
}

template <typename T>
void load_queries(const AttentionCall& c, const AttentionItem& item, const Work& w) {
  for (int64_t r = 0; r < w.rows; ++r) {
    const T* q = static_cast<const T*>(c.q) + (item.token + r / c.group) * c.q_token +
                 (item.kv_head * c.group + r % c.group) * c.q_head;
    float* to = w.q + r * w.q_width;
    for (int64_t d = 0; d < w.q_width; d += kLanes) {
      const int64_t n = c.k_dim - d;
      const VF v = n >= kLanes ? load(q + d) : n > 0 ? load_n(q + d, n) : VF{};
      store(to + d, v * c.scale);
    }
  }
}

template <typename Q, typename T>
void run(const AttentionCall& c, const AttentionItem& item, const AttentionItem* next,
         float* scratch) {
  Work w = lay_out(c, item.tokens * c.group, scratch);
  load_queries<Q>(c, item, w);
  const Keys keys = keys_of(c, item);
  Tile tiles[2], *now = tiles, *then = tiles + 1;
  locate(c, item, keys, keys.begin, *now);
  if (!item.partial) clear(w.total, w.rows, w.v_width);
  for (int64_t split = item.split_begin; split < item.split_end; ++split) {
    if (item.partial) {
      float* p =
          item.partial + (split - item.split_begin) * attention_partial_size(w.rows, c.v_dim);
      w.split = state_at(p, w.rows);
    }
    run_split<T>(c, item, keys, split, next, w, now, then);
    if (!item.partial) merge(w.total, w.split, w.rows, w.v_width);
  }
  if (!item.partial) finish(c, item, w.total, w.v_width);
}

template <typename Q>
void run_as(const AttentionCall& c, const AttentionItem& item, const AttentionItem* next,
            float* scratch) {
  c.float8 ? run<Q, float>(c, item, next, scratch) : run<Q, Q>(c, item, next, scratch);
}

template <typename T>
void merge_as(const MergeRows& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / p.heads, head = row % p.heads;
    T* out = static_cast<T*>(p.out) + token * p.out_token + head * p.out_head;
    const T* other = static_cast<const T*>(p.other) + token * p.other_token + head * p.other_head;
    float* lse = p.lse + token * p.lse_token + head;
    const float a_lse = *lse, b_lse = p.other_lse[token * p.other_lse_token + head];
    const float most = b_lse > a_lse ? b_lse : a_lse;
    const bool none = most == -kInfinity;
    const float a = none ? 0 : exp_one(a_lse - most), b = none ? 0 : exp_one(b_lse - most);
    const float sum = a + b, factor = none ? 0 : 1 / sum;
    for (int64_t d = 0; d < p.dim; d += kLanes) {
      const int n = p.dim - d < kLanes ? p.dim - d : kLanes;
      // A part without weight is not looked at: it may hold anything.
      const VF x = a == 0 ? VF{} : load_n(out + d, n) * splat(a * factor);
      const VF y = b == 0 ? VF{} : load_n(other + d, n) * splat(b * factor);
      store_n(out + d, x + y, n);
    }
    *lse = none ? -kInfinity : most + __builtin_logf(sum);
  }
}

}  // namespace

void attention_item(const AttentionCall& c, const AttentionItem& item, const AttentionItem* next,
                    float* scratch) {
  switch (c.dtype) {
    case ScalarType::Float: return run_as<float>(c, item, next, scratch);
    case ScalarType::BFloat16: return run_as<BF16>(c, item, next, scratch);
    default: return run_as<F16>(c, item, next, scratch);
  }
}

void attention_finish(const AttentionCall& c, const AttentionItem& item, float* scratch) {
  const int64_t rows = item.tokens * c.group, width = round_up(c.v_dim, kLanes);
  const State total = state_at(scratch, rows);
  clear(total, rows, width);
  for (int64_t i = 0; i < item.split_end - item.split_begin; ++i) {
    merge(total, state_at(item.partial + i * attention_partial_size(rows, c.v_dim), rows), rows,
          width);
  }
  finish(c, item, total, width);
}

void merge_rows(const MergeRows& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case ScalarType::Float: return merge_as<float>(p, begin, end);
    case ScalarType::BFloat16: return merge_as<BF16>(p, begin, end);
    default: return merge_as<F16>(p, begin, end);
  }
}

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
