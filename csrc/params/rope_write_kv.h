// Arguments of rope_write_kv.
#pragma once

#include <tuple>
#include <vector>

#include "cache.h"
#include "shards.h"

namespace torch_pd {

struct RopeWriteKV {
  KVCache cache;
  const void* qkv;
  void* q;
  ScalarType dtype;
  int64_t num_tokens, num_heads, head_dim, qkv_token, q_token, q_head;  // strides
  const int64_t* slots;
  const void *cos = nullptr, *sin = nullptr;  // [T, rope_dim] or null: no rotation
  bool rope_float = false;                    // cos and sin are float32, else `dtype`
  int64_t rope_dim = 0, cos_token = 0, sin_token = 0;
  const void *q_norm = nullptr, *k_norm = nullptr;  // dtype of qkv
  bool norm_whole = false;                          // one norm over all heads, else one per head
  float eps, norm_offset;
  std::vector<int64_t> shard_heads;  // KV heads of each shard; sums to num_kv_heads
  // Shards behind each other: shard s is [T, its heads * head_dim], else columns of one row.
  bool blocked = false;
};

inline RopeWriteKV make_rope_write_kv(const char* op, const Tensor& qkv, const Tensor& q,
                                      const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& slots, const OptTensor& cos,
                                      const OptTensor& sin, const OptTensor& q_norm,
                                      const OptTensor& k_norm, double eps, double norm_offset,
                                      const std::optional<std::vector<int64_t>>& shard_heads,
                                      bool blocked, const OptTensor& k_scale,
                                      const OptTensor& v_scale) {
  RopeWriteKV p{make_cache(op, k_cache, v_cache, k_scale, v_scale)};
  const int64_t kv_heads = p.cache.num_kv_heads;
  check_dim(op, "qkv", qkv, 2);
  check_dim(op, "q", q, 3);
  check_matches_cache(op, "qkv", qkv, k_cache);
  check_same_dtype(op, "q", q, "qkv", qkv);
  check_same_device(op, "q", q, "qkv", qkv);
  check_last_contiguous(op, "qkv", qkv);
  check_last_contiguous(op, "q", q);
  check_output(op, "q", q);
  p.num_tokens = qkv.size(0), p.num_heads = q.size(1), p.head_dim = q.size(2);
  check_size(op, "q", q, 0, p.num_tokens);
  TPD_CHECK(op, p.cache.k_dim == p.head_dim && p.cache.v_dim == p.head_dim, "q has head_dim ",
            p.head_dim, " but the cache has ", p.cache.k_dim, " and ", p.cache.v_dim);
  TPD_CHECK(op, p.num_heads > 0 && p.num_heads % kv_heads == 0, p.num_heads,
            " query heads are not a multiple of ", kv_heads, " KV heads");
  check_size(op, "qkv", qkv, 1, (p.num_heads + 2 * kv_heads) * p.head_dim);
  check_index(op, "slots", slots, ScalarType::Long, 1, "qkv", qkv);
  check_size(op, "slots", slots, 0, p.num_tokens);
  p.qkv = qkv.data_ptr(), p.q = q.data_ptr(), p.dtype = qkv.scalar_type();
  p.qkv_token = qkv.stride(0), p.q_token = q.stride(0), p.q_head = q.stride(1);
  p.slots = static_cast<const int64_t*>(slots.data_ptr());

  TPD_CHECK(op, cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (cos) {
    for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"cos", *cos},
                                  std::pair<const char*, const Tensor&>{"sin", *sin}}) {
      check_dim(op, name, t, 2);
      check_size(op, name, t, 0, p.num_tokens);
      check_size(op, name, t, 1, cos->size(1));
      check_last_contiguous(op, name, t);
      check_same_device(op, name, t, "qkv", qkv);
      check_same_dtype(op, name, t, "cos", *cos);
    }
    p.rope_dim = cos->size(1);
    TPD_CHECK(op, p.rope_dim >= 2 && p.rope_dim % 2 == 0 && p.rope_dim <= p.head_dim,
              "cos and sin must be even and at most head_dim ", p.head_dim, " wide, got ",
              p.rope_dim);
    p.rope_float = cos->scalar_type() == ScalarType::Float;
    if (!p.rope_float) check_same_dtype(op, "cos", *cos, "qkv", qkv);
    p.cos = cos->data_ptr(), p.sin = sin->data_ptr();
    p.cos_token = cos->stride(0), p.sin_token = sin->stride(0);
  }
  TPD_CHECK(op, q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm go together");
  if (q_norm) {
    for (const auto& [name, t, heads] :
         {std::tuple<const char*, const Tensor&, int64_t>{"q_norm", *q_norm, p.num_heads},
          std::tuple<const char*, const Tensor&, int64_t>{"k_norm", *k_norm, kv_heads}}) {
      check_dim(op, name, t, 1);
      check_same_dtype(op, name, t, "qkv", qkv);
      check_same_device(op, name, t, "qkv", qkv);
      check_contiguous(op, name, t);
      TPD_CHECK(op, t.size(0) == p.head_dim || t.size(0) == heads * p.head_dim, name, " must have ",
                p.head_dim, " or ", heads * p.head_dim, " elements, got ", t.size(0));
    }
    // With one head the two readings are the same norm.
    p.norm_whole = q_norm->size(0) != p.head_dim || k_norm->size(0) != p.head_dim;
    TPD_CHECK(op,
              !p.norm_whole || (q_norm->size(0) == p.num_heads * p.head_dim &&
                                k_norm->size(0) == kv_heads * p.head_dim),
              "q_norm with ", q_norm->size(0), " and k_norm with ", k_norm->size(0),
              " elements: one is per head, the other over all heads");
    p.q_norm = q_norm->data_ptr(), p.k_norm = k_norm->data_ptr();
  }
  p.eps = static_cast<float>(eps), p.norm_offset = static_cast<float>(norm_offset);
  p.shard_heads = shard_heads.value_or(std::vector<int64_t>{kv_heads});
  check_shards(op, "shard_heads", p.shard_heads, kv_heads, "the cache has ", " KV heads");
  TPD_CHECK(op, !blocked || shard_heads, "blocked needs shard_heads");
  if (blocked) check_contiguous(op, "qkv", qkv);
  p.blocked = blocked;
  return p;
}

}  // namespace torch_pd
