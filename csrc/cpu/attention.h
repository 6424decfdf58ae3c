// Kernels of paged_attention and merge_attention, one set per instruction set (isa.h).
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "isa.h"

namespace torch_pd {

using torch::headeronly::ScalarType;

// Keys are taken in tiles at absolute positions 0, 64, 128 ..., tiles in splits at absolute
// positions 0, 1024 .... A row's result is the in-order merge of its splits, each the in-order sum
// over its tiles: the same arithmetic whatever the chunk, the batch and the threads are.
constexpr int kTileKeys = 64;
constexpr int kSplitKeys = 1024;

// What all work items of one call share. Strides in elements.
struct AttentionCall {
  const void* q;
  void* out;
  float* lse;               // null if not asked for
  const float* sinks;       // null if none
  ScalarType dtype;         // of q and out: float32, bfloat16 or float16
  bool bytes, int8;         // of the cache: bytes with scales; else `dtype`
  const char *k[8], *v[8];  // this layer in every place
  const float *k_scale[8], *v_scale[8];
  int64_t k_page, k_token, k_head, v_page, v_token, v_head;
  int64_t ks_page, ks_token, vs_page, vs_token;
  const int32_t* block_tables;
  int64_t table_stride;
  int page_shift;        // block_size == 1 << page_shift
  int64_t group;         // query heads of a KV head
  int64_t k_dim, v_dim;  // elements of a head
  int64_t q_token, q_head, out_token, out_head, lse_token;
  int64_t window;  // 0 = none
  float scale, soft_cap;
};

// `tokens` queries of one sequence, with all query heads of one KV head: rows [tokens * group].
struct AttentionItem {
  int32_t sequence, kv_head;
  int64_t token;     // row of q of the first query
  int64_t position;  // of the first query in its sequence
  int32_t tokens;
  int32_t split_begin, split_end;
  float* partial;  // if not null: splits go here, attention_partial_size(...) floats each
};

// Internal linkage: isa/ sources use these too (isa.h, Rule).
static constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Row maxima, row sums, unnormalised rows of v_dim rounded up to 16.
static inline int64_t attention_partial_size(int64_t rows, int64_t v_dim) {
  return rows * (2 + round_up(v_dim, 16));
}

// Floats that attention_item needs for items of up to `rows` rows: two partials, tiles of K (as it
// lies and transposed) and V, queries, scores, per-row sums and factors, rounded up generously.
static inline int64_t attention_scratch_size(int64_t rows, int64_t k_dim, int64_t v_dim) {
  return 2 * attention_partial_size(rows, v_dim) +
         kTileKeys * (2 * round_up(k_dim, 32) + round_up(v_dim, 16)) +
         rows * (round_up(k_dim, 32) + kTileKeys + 16 + 2) + 256;
}

// The splits of one item: into item.partial, or merged, normalised and written to out. next: the
// item that this thread probably does next, or null; its first tile is fetched meanwhile.
TPD_ISA(void, attention_item,
        (const AttentionCall& c, const AttentionItem& item, const AttentionItem* next,
         float* scratch))

// Merges the partials of one item, in order, and writes out.
TPD_ISA(void, attention_finish, (const AttentionCall& c, const AttentionItem& item, float* scratch))

// Rows of merge_attention; row = token * heads + head.
struct MergeRows {
  void* out;
  const void* other;
  float* lse;
  const float* other_lse;
  ScalarType dtype;
  int64_t heads, dim, out_token, out_head, other_token, other_head, lse_token, other_lse_token;
};
TPD_ISA(void, merge_rows, (const MergeRows& p, int64_t begin, int64_t end))

}  // namespace torch_pd
