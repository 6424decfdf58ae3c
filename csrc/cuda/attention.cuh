// Arguments and device helpers shared by the attention kernels.
//
// Query heads that share a KV head are packed into rows of one matrix: row r of sequence s and KV
// head h is query token r / group, query head h * group + r % group.
#pragma once

#include "../params/attention.h"
#include "common.cuh"
#include "ptx.cuh"

namespace torch_pd {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// How the cache holds keys and values: as q is, or as bytes with a scale for each head of a token.
enum Stored { kAsQuery, kFloat8, kInt8 };

inline Stored stored_as(ScalarType cache) {
  return cache == ScalarType::Char ? kInt8 : cache == ScalarType::Byte ? kFloat8 : kAsQuery;
}

// Strides in bytes for the cache (k_scale, v_scale: in floats), in elements elsewhere.
struct AttentionArgs {
  const char *k, *v;
  int64_t k_page, v_page;
  int32_t k_token, k_head, v_token, v_head;
  const float *k_scale, *v_scale;  // of bytes only
  int64_t ks_page, vs_page;
  int32_t ks_token, vs_token;
  const int64_t* places;  // [num_places, 2] or null
  int32_t num_places, num_pages, block_shift;

  const int32_t *tables, *seq_lens, *query_start;
  int64_t table_stride;
  int32_t num_seqs, max_pages, max_query_len;

  const void* q;
  void* out;
  float* lse;
  const float* sinks;
  int64_t q_token, q_head, out_token, out_head, lse_token;
  int32_t num_tokens, num_heads, num_kv_heads, group, window;
  // logit * log2(e) = dot * scale_log2 without a cap, else cap_log2 * tanh(dot * scale_cap)
  float scale_log2, scale_cap, cap_log2;

  // A kernel takes the sequences whose packed rows r are min_rows < r <= max_rows.
  int32_t min_rows, max_rows;
  int32_t* errors;
};

// One sequence as the kernels see it; q_len 0 if it has no work.
struct Sequence {
  int32_t len, q_start, q_len;
  int32_t begin;  // first key that any query sees

  __device__ __forceinline__ int32_t position(int32_t token) const { return len - q_len + token; }
};

// Reads sequence `s`. A length or query range that does not fit the tensors, the table or itself is
// raised (if `reports`) and the sequence left out.
__device__ __forceinline__ Sequence read_sequence(const AttentionArgs& a, int32_t s, bool reports) {
  Sequence q{a.seq_lens[s], a.query_start[s], 0, 0};
  const int64_t queries = static_cast<int64_t>(a.query_start[s + 1]) - q.q_start;
  if (q.len < 0 || q.len > static_cast<int64_t>(a.max_pages) << a.block_shift) {
    if (reports) raise_flag(a.errors, kPagedAttention, kBadLength, q.len);
    return q;
  }
  if (q.q_start < 0 || q.q_start + queries > a.num_tokens || queries < 0 ||
      queries > min(q.len, a.max_query_len)) {
    if (reports) raise_flag(a.errors, kPagedAttention, kBadLength, queries);
    return q;
  }
  const int64_t rows = queries * a.group;
  if (rows <= a.min_rows || rows > a.max_rows) return q;
  q.q_len = static_cast<int32_t>(queries);
  if (a.window > 0) q.begin = max(0, q.position(0) - a.window + 1);
  return q;
}

// Page `index` of the place whose pool starts `shift` bytes after that of place 0.
struct PageAt {
  int64_t shift;
  int32_t index;
  bool valid;
};

// Raises a block table entry that is no page (if `reports`).
__device__ __forceinline__ PageAt locate_page(const AttentionArgs& a, int32_t entry, bool reports) {
  const uint32_t place = static_cast<uint32_t>(entry) >> kPlaceShift;
  PageAt p{0, entry & kPageIndexMask, false};
  int64_t pages = a.num_pages;
  bool known = place == 0;
  if (!known && place < static_cast<uint32_t>(a.num_places)) {
    known = true;
    p.shift = a.places[2 * place] - a.places[0];
    pages = a.places[2 * place + 1];
  }
  p.valid = known && p.index < pages;
  if (!p.valid && reports)
    raise_flag(a.errors, kPagedAttention, known ? kBadPage : kBadPlace, entry);
  return p;
}

// Where a block table entry's page starts, as offsets to the layer's K and V of place 0.
struct Page {
  const char *k, *v;
  const float *k_scale, *v_scale;
  bool valid;
};

template <bool FP8>
__device__ __forceinline__ Page find_page(const AttentionArgs& a, int32_t entry, bool reports) {
  const PageAt at = locate_page(a, entry, reports);
  Page p{a.k, a.v, a.k_scale, a.v_scale, at.valid};
  if (!p.valid) return p;
  p.k += at.shift + at.index * a.k_page;
  p.v += at.shift + at.index * a.v_page;
  if constexpr (FP8) {
    p.k_scale += at.shift / 4 + at.index * a.ks_page;
    p.v_scale += at.shift / 4 + at.index * a.vs_page;
  }
  return p;
}

// log2(e) times the logit of a dot product, with a soft cap.
__device__ __forceinline__ float capped_logit(const AttentionArgs& a, float dot) {
  // tanh(x) = 1 - 2 / (exp(2x) + 1); the hardware's tanh is good to 11 bits only.
  const float e = ptx::exp2_approx(dot * a.scale_cap * (2.0f * kLog2e));
  return a.cap_log2 * (1.0f - __fdividef(2.0f, e + 1.0f));
}

// Keeps exp2(x - base) free of NaN while no key has been seen.
__device__ __forceinline__ float finite_base(float m) { return m == -INFINITY ? 0.0f : m; }

// A row's running maximum (of logits * log2(e)) and sum, closed: factor of its values, lse.
struct Closed {
  float factor, lse;
};
__device__ __forceinline__ Closed close_row(const AttentionArgs& a, float m, float l, int head) {
  float top = m;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * kLog2e;
    top = fmaxf(m, sink);
    l = l * ptx::exp2_approx(m - finite_base(top)) + ptx::exp2_approx(sink - finite_base(top));
  }
  if (l == 0.0f) return {0.0f, -INFINITY};
  return {ptx::exp2_approx(m - finite_base(top)) / l, (top + log2f(l)) * kLn2};
}

}  // namespace torch_pd
