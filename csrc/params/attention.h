// Arguments of paged_attention and merge_attention.
#pragma once

#include "cache.h"

namespace torch_pd {

struct Attention {
  KVCache cache;
  Tables tables;
  Places places;
  const void* q;
  void* out;
  float* lse;  // null if not asked for
  ScalarType dtype;
  const float* sinks;  // [H] or null
  const int32_t* query_start;
  int64_t num_tokens, num_heads, max_query_len, window;  // window 0 = none
  int64_t q_token, q_head, out_token, out_head, lse_token;
  float scale, soft_cap;  // soft_cap 0 = none
};

inline Attention make_attention(const char* op, const Tensor& q, const Tensor& k_cache,
                                const Tensor& v_cache, const Tensor& block_tables,
                                const Tensor& seq_lens, const Tensor& query_start,
                                const Tensor& out, double scale, int64_t max_query_len,
                                int64_t window, double soft_cap, const OptTensor& sinks,
                                const OptTensor& k_scale, const OptTensor& v_scale,
                                const OptTensor& places, const OptTensor& lse) {
  Attention p{make_cache(op, k_cache, v_cache, k_scale, v_scale),
              make_tables(op, block_tables, seq_lens, k_cache), make_places(op, places, k_cache)};
  check_dim(op, "q", q, 3);
  check_dim(op, "out", out, 3);
  check_matches_cache(op, "q", q, k_cache);
  check_same_dtype(op, "out", out, "q", q);
  check_same_device(op, "out", out, "q", q);
  check_last_contiguous(op, "q", q);
  check_last_contiguous(op, "out", out);
  check_output(op, "out", out);
  p.num_tokens = q.size(0), p.num_heads = q.size(1);
  check_size(op, "q", q, 2, p.cache.k_dim);
  check_size(op, "out", out, 0, p.num_tokens);
  check_size(op, "out", out, 1, p.num_heads);
  check_size(op, "out", out, 2, p.cache.v_dim);
  TPD_CHECK(op, p.num_heads > 0 && p.num_heads % p.cache.num_kv_heads == 0, p.num_heads,
            " query heads are not a multiple of ", p.cache.num_kv_heads, " KV heads");
  check_index(op, "query_start", query_start, ScalarType::Int, 1, "k_cache", k_cache);
  check_size(op, "query_start", query_start, 0, p.tables.num_seqs + 1);
  TPD_CHECK(op, max_query_len >= 1, "max_query_len must be at least 1, got ", max_query_len);
  TPD_CHECK(op, window >= 0, "window must be 0 (none) or positive, got ", window);
  TPD_CHECK(op, soft_cap >= 0, "soft_cap must be 0 (none) or positive, got ", soft_cap);
  if (sinks) {
    check_dtype(op, "sinks", *sinks, ScalarType::Float);
    check_dim(op, "sinks", *sinks, 1);
    check_size(op, "sinks", *sinks, 0, p.num_heads);
    check_contiguous(op, "sinks", *sinks);
    check_same_device(op, "sinks", *sinks, "q", q);
  }
  if (lse) {
    check_dtype(op, "lse", *lse, ScalarType::Float);
    check_dim(op, "lse", *lse, 2);
    check_size(op, "lse", *lse, 0, p.num_tokens);
    check_size(op, "lse", *lse, 1, p.num_heads);
    check_last_contiguous(op, "lse", *lse);
    check_output(op, "lse", *lse);
    check_same_device(op, "lse", *lse, "q", q);
  }
  p.q = q.data_ptr(), p.out = out.data_ptr(), p.dtype = q.scalar_type();
  p.lse = lse ? static_cast<float*>(lse->data_ptr()) : nullptr;
  p.lse_token = lse ? lse->stride(0) : 0;
  p.sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
  p.query_start = static_cast<const int32_t*>(query_start.data_ptr());
  p.max_query_len = max_query_len, p.window = window;
  p.q_token = q.stride(0), p.q_head = q.stride(1);
  p.out_token = out.stride(0), p.out_head = out.stride(1);
  p.scale = static_cast<float>(scale), p.soft_cap = static_cast<float>(soft_cap);
  return p;
}

struct MergeAttention {
  void* out;
  const void* other;
  float* lse;
  const float* other_lse;
  ScalarType dtype;
  int64_t num_tokens, num_heads, head_dim;
  int64_t out_token, out_head, other_token, other_head, lse_token, other_lse_token;
};

inline MergeAttention make_merge_attention(const char* op, const Tensor& out, const Tensor& lse,
                                           const Tensor& other, const Tensor& other_lse) {
  check_dim(op, "out", out, 3);
  check_float(op, "out", out);
  check_dim(op, "other", other, 3);
  check_same_dtype(op, "other", other, "out", out);
  check_output(op, "out", out);
  check_output(op, "lse", lse);
  for (int d = 0; d < 3; ++d) check_size(op, "other", other, d, out.size(d));
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"lse", lse},
                                std::pair<const char*, const Tensor&>{"other_lse", other_lse}}) {
    check_dtype(op, name, t, ScalarType::Float);
    check_dim(op, name, t, 2);
    check_size(op, name, t, 0, out.size(0));
    check_size(op, name, t, 1, out.size(1));
    check_last_contiguous(op, name, t);
    check_same_device(op, name, t, "out", out);
  }
  check_same_device(op, "other", other, "out", out);
  check_last_contiguous(op, "out", out);
  check_last_contiguous(op, "other", other);
  return {out.data_ptr(),
          other.data_ptr(),
          static_cast<float*>(lse.data_ptr()),
          static_cast<const float*>(other_lse.data_ptr()),
          out.scalar_type(),
          out.size(0),
          out.size(1),
          out.size(2),
          out.stride(0),
          out.stride(1),
          other.stride(0),
          other.stride(1),
          lse.stride(0),
          other_lse.stride(0)};
}

}  // namespace torch_pd
