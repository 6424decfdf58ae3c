// Paged attention: online softmax over tiles of 64 keys (Milakov and Gimelshein 2018; tiles as in
// FlashAttention, Dao et al. 2022). Rows of an item are (token, query head) pairs that share one KV
// head, so each tile of K and V is fetched and converted once for all of them.
#include "../attention.h"

#include "attention_tile.h"
#include "vector_math.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

namespace {

// Register tile of multiply.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

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
    if (ahead) {
      fetch_rows(ahead->k, round_up(t.end, kLanes), ahead->end, c.k_dim * sizeof(T));
    }
    few_scores<T, R>(c, t, ahead, w, w.scores);
    softmax_tile(c, item, t, 0, R, w);
    if (ahead) fetch_rows(ahead->v, t.end, ahead->end, c.v_dim * sizeof(T));
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
    if (c.bytes) {
      expand_bytes(c, item, w, *now);
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
  c.bytes ? run<Q, float>(c, item, next, scratch) : run<Q, Q>(c, item, next, scratch);
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
