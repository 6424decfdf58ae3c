// Checked arguments of every op as plain structs: built once here, used by csrc/cpu and csrc/cuda.
// Everything about shapes, dtypes and devices is checked here. Values inside index tensors are
// checked by the CPU bodies (error) and inside the CUDA kernels (access dropped, flag raised).
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"

namespace torch_pd {

constexpr int kPlaceShift = 28;  // block table entry: place << 28 | index
constexpr int32_t kPageIndexMask = (1 << kPlaceShift) - 1;

// One layer of a paged KV pool. Strides in elements.
struct KVCache {
  void* k;
  void* v;
  ScalarType dtype;
  int64_t num_pages, block_size, num_kv_heads, k_dim, v_dim;
  int64_t k_page, k_token, k_head;  // strides
  int64_t v_page, v_token, v_head;
  // Of bytes (is_bytes) only, else null: [pages, block_size, num_kv_heads], strides in floats.
  float* k_scale = nullptr;
  float* v_scale = nullptr;
  int64_t ks_page = 0, ks_token = 0, vs_page = 0, vs_token = 0;
};

// Pools that block table entries may point to: row p is place p, row 0 this pool itself.
struct Places {
  const int64_t* rows = nullptr;  // [count, 2]: base address of a pool, its number of pages
  int64_t count = 0;
};

// True of what a cache keeps with a scale for each head of a token: int8 as such, and uint8, which
// is float8 of three exponent and four mantissa bits (docs/layouts.md). Of each the largest value.
inline bool is_bytes(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Char;
}
constexpr float kFloat8Max = 31.0f / 4096.0f, kInt8Max = 127.0f;

inline KVCache make_cache(const char* op, const Tensor& k, const Tensor& v,
                          const OptTensor& k_scale, const OptTensor& v_scale) {
  check_dim(op, "k_cache", k, 4);
  check_dim(op, "v_cache", v, 4);
  check_last_contiguous(op, "k_cache", k);
  check_last_contiguous(op, "v_cache", v);
  check_output(op, "k_cache", k);
  check_output(op, "v_cache", v);
  check_same_dtype(op, "v_cache", v, "k_cache", k);
  check_same_device(op, "v_cache", v, "k_cache", k);
  for (int d = 0; d < 3; ++d) check_size(op, "v_cache", v, d, k.size(d));
  const int64_t block_size = k.size(1);
  TPD_CHECK(op, block_size == 16 || block_size == 32 || block_size == 64,
            "block_size must be 16, 32 or 64, got ", block_size);
  TPD_CHECK(op, k.size(0) <= kPageIndexMask, "at most ", kPageIndexMask, " pages, got ", k.size(0));
  TPD_CHECK(op, k.size(2) > 0 && k.size(3) > 0 && v.size(3) > 0, "empty cache ", shape_name(k));
  KVCache c{k.data_ptr(), v.data_ptr(), k.scalar_type(), k.size(0),   block_size,
            k.size(2),    k.size(3),    v.size(3),       k.stride(0), k.stride(1),
            k.stride(2),  v.stride(0),  v.stride(1),     v.stride(2)};
  const bool bytes = is_bytes(c.dtype);
  if (!bytes) check_float(op, "k_cache", k);
  TPD_CHECK(op, k_scale.has_value() == bytes && v_scale.has_value() == bytes,
            "k_scale and v_scale are ", bytes ? "required" : "not allowed", " for a ",
            dtype_name(c.dtype), " cache");
  if (bytes) {
    for (const auto& [name, s] : {std::pair<const char*, const Tensor&>{"k_scale", *k_scale},
                                  std::pair<const char*, const Tensor&>{"v_scale", *v_scale}}) {
      check_dtype(op, name, s, ScalarType::Float);
      check_dim(op, name, s, 3);
      for (int d = 0; d < 3; ++d) check_size(op, name, s, d, k.size(d));
      check_last_contiguous(op, name, s);
      check_output(op, name, s);
      check_same_device(op, name, s, "k_cache", k);
    }
    c.k_scale = static_cast<float*>(k_scale->data_ptr());
    c.v_scale = static_cast<float*>(v_scale->data_ptr());
    c.ks_page = k_scale->stride(0), c.ks_token = k_scale->stride(1);
    c.vs_page = v_scale->stride(0), c.vs_token = v_scale->stride(1);
  }
  return c;
}

inline Places make_places(const char* op, const OptTensor& places, const Tensor& k_cache) {
  if (!places) return {};
  check_index(op, "places", *places, ScalarType::Long, 2, "k_cache", k_cache);
  check_contiguous(op, "places", *places);
  check_size(op, "places", *places, 1, 2);
  TPD_CHECK(op, places->size(0) >= 1 && places->size(0) <= 8, "places must have 1 to 8 rows, got ",
            places->size(0));
  return {static_cast<const int64_t*>(places->data_ptr()), places->size(0)};
}

// Model dtype of a cache: q, k and v must match it unless the cache is of bytes.
inline void check_matches_cache(const char* op, const char* name, const Tensor& t,
                                const Tensor& k_cache) {
  check_float(op, name, t);
  if (!is_bytes(k_cache.scalar_type())) {
    check_same_dtype(op, name, t, "k_cache", k_cache);
  }
  check_same_device(op, name, t, "k_cache", k_cache);
}

struct WriteKV {
  KVCache cache;
  const void *k, *v;
  ScalarType dtype;
  int64_t num_tokens, k_token, k_head, v_token, v_head;  // strides of k and v
  const int64_t* slots;
};

inline WriteKV make_write_kv(const char* op, const Tensor& k, const Tensor& v,
                             const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                             const OptTensor& k_scale, const OptTensor& v_scale) {
  WriteKV p{make_cache(op, k_cache, v_cache, k_scale, v_scale)};
  check_dim(op, "k", k, 3);
  check_dim(op, "v", v, 3);
  check_matches_cache(op, "k", k, k_cache);
  check_matches_cache(op, "v", v, k_cache);
  check_same_dtype(op, "v", v, "k", k);
  check_size(op, "v", v, 0, k.size(0));
  check_size(op, "k", k, 1, p.cache.num_kv_heads);
  check_size(op, "v", v, 1, p.cache.num_kv_heads);
  check_size(op, "k", k, 2, p.cache.k_dim);
  check_size(op, "v", v, 2, p.cache.v_dim);
  check_last_contiguous(op, "k", k);
  check_last_contiguous(op, "v", v);
  check_index(op, "slots", slots, ScalarType::Long, 1, "k_cache", k_cache);
  check_size(op, "slots", slots, 0, k.size(0));
  p.k = k.data_ptr(), p.v = v.data_ptr(), p.dtype = k.scalar_type(), p.num_tokens = k.size(0);
  p.k_token = k.stride(0), p.k_head = k.stride(1), p.v_token = v.stride(0), p.v_head = v.stride(1);
  p.slots = static_cast<const int64_t*>(slots.data_ptr());
  return p;
}

// Block tables and lengths of a batch.
struct Tables {
  const int32_t* block_tables;
  int64_t num_seqs, max_pages, table_stride;
  const int32_t* seq_lens;
};

inline Tables make_tables(const char* op, const Tensor& block_tables, const Tensor& seq_lens,
                          const Tensor& k_cache) {
  check_index(op, "block_tables", block_tables, ScalarType::Int, 2, "k_cache", k_cache);
  check_index(op, "seq_lens", seq_lens, ScalarType::Int, 1, "k_cache", k_cache);
  check_size(op, "seq_lens", seq_lens, 0, block_tables.size(0));
  return {static_cast<const int32_t*>(block_tables.data_ptr()), block_tables.size(0),
          block_tables.size(1), block_tables.stride(0),
          static_cast<const int32_t*>(seq_lens.data_ptr())};
}

struct GatherKV {
  KVCache cache;
  Tables tables;
  Places places;
  const int32_t* kv_start;  // [num_seqs + 1]
  void *k, *v;
  ScalarType dtype;
  int64_t num_tokens, k_token, k_head, v_token, v_head;
};

inline GatherKV make_gather_kv(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                               const Tensor& block_tables, const Tensor& seq_lens,
                               const Tensor& kv_start, const Tensor& k, const Tensor& v,
                               const OptTensor& k_scale, const OptTensor& v_scale,
                               const OptTensor& places) {
  GatherKV p{make_cache(op, k_cache, v_cache, k_scale, v_scale),
             make_tables(op, block_tables, seq_lens, k_cache), make_places(op, places, k_cache)};
  check_index(op, "kv_start", kv_start, ScalarType::Int, 1, "k_cache", k_cache);
  check_size(op, "kv_start", kv_start, 0, p.tables.num_seqs + 1);
  check_dim(op, "k", k, 3);
  check_dim(op, "v", v, 3);
  check_matches_cache(op, "k", k, k_cache);
  check_matches_cache(op, "v", v, k_cache);
  check_same_dtype(op, "v", v, "k", k);
  check_size(op, "v", v, 0, k.size(0));
  check_size(op, "k", k, 1, p.cache.num_kv_heads);
  check_size(op, "v", v, 1, p.cache.num_kv_heads);
  check_size(op, "k", k, 2, p.cache.k_dim);
  check_size(op, "v", v, 2, p.cache.v_dim);
  check_last_contiguous(op, "k", k);
  check_last_contiguous(op, "v", v);
  check_output(op, "k", k);
  check_output(op, "v", v);
  p.kv_start = static_cast<const int32_t*>(kv_start.data_ptr());
  p.k = k.data_ptr(), p.v = v.data_ptr(), p.dtype = k.scalar_type(), p.num_tokens = k.size(0);
  p.k_token = k.stride(0), p.k_head = k.stride(1), p.v_token = v.stride(0), p.v_head = v.stride(1);
  return p;
}

struct CopyPages {
  const char* src;
  char* dst;
  int64_t src_pages, dst_pages, src_stride, dst_stride, page_bytes;  // strides in bytes
  const int64_t* moves;                                              // [num_moves, 2]
  int64_t num_moves;
};

inline CopyPages make_copy_pages(const char* op, const Tensor& src, const Tensor& dst,
                                 const Tensor& moves) {
  check_same_dtype(op, "dst", dst, "src", src);
  check_same_device(op, "dst", dst, "src", src);
  TPD_CHECK(op, src.dim() >= 2, "src must have at least 2 dimensions, got ", shape_name(src));
  check_dim(op, "dst", dst, src.dim());
  int64_t elements = 1;
  for (int64_t d = src.dim() - 1; d >= 1; --d) {
    check_size(op, "dst", dst, d, src.size(d));
    for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"src", src},
                                  std::pair<const char*, const Tensor&>{"dst", dst}}) {
      TPD_CHECK(op, t.size(d) <= 1 || t.stride(d) == elements, name,
                " pages must be contiguous: stride of dimension ", d, " must be ", elements,
                ", got ", t.stride(d));
    }
    elements *= src.size(d);
  }
  check_output(op, "dst", dst);
  check_index(op, "moves", moves, ScalarType::Long, 2, "src", src);
  check_contiguous(op, "moves", moves);
  check_size(op, "moves", moves, 1, 2);
  const int64_t item = src.element_size();
  return {static_cast<const char*>(src.data_ptr()),
          static_cast<char*>(dst.data_ptr()),
          src.size(0),
          dst.size(0),
          src.stride(0) * item,
          dst.stride(0) * item,
          elements * item,
          static_cast<const int64_t*>(moves.data_ptr()),
          moves.size(0)};
}

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
  int64_t sum = 0;
  for (int64_t heads : p.shard_heads) {
    TPD_CHECK(op, heads >= 0, "shard_heads must not be negative, got ", heads);
    sum += heads;
  }
  TPD_CHECK(op, sum == kv_heads && p.shard_heads.size() <= 64, "shard_heads has ",
            p.shard_heads.size(), " shards that sum to ", sum, ", the cache has ", kv_heads,
            " KV heads (at most 64 shards)");
  TPD_CHECK(op, !blocked || shard_heads, "blocked needs shard_heads");
  if (blocked) check_contiguous(op, "qkv", qkv);
  p.blocked = blocked;
  return p;
}

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

struct RmsNorm {
  const void *x, *weight;
  void *out, *residual;  // residual null if not given
  ScalarType dtype;
  int64_t num_tokens, width, x_token, out_token, residual_token;
  float eps, scale, offset;
};

inline RmsNorm make_rms_norm(const char* op, const Tensor& x, const Tensor& weight,
                             const Tensor& out, double eps, const OptTensor& residual, double scale,
                             double offset) {
  check_dim(op, "x", x, 2);
  check_float(op, "x", x);
  check_last_contiguous(op, "x", x);
  check_dim(op, "weight", weight, 1);
  check_size(op, "weight", weight, 0, x.size(1));
  check_same_dtype(op, "weight", weight, "x", x);
  check_same_device(op, "weight", weight, "x", x);
  check_contiguous(op, "weight", weight);
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_dim(op, name, t, 2);
    check_size(op, name, t, 0, x.size(0));
    check_size(op, name, t, 1, x.size(1));
    check_same_dtype(op, name, t, "x", x);
    check_same_device(op, name, t, "x", x);
    check_last_contiguous(op, name, t);
    check_output(op, name, t);
  };
  check_like("out", out);
  if (residual) check_like("residual", *residual);
  TPD_CHECK(op, residual || scale == 1.0, "scale ", scale, " needs a residual");
  return {x.data_ptr(),
          weight.data_ptr(),
          out.data_ptr(),
          residual ? residual->data_ptr() : nullptr,
          x.scalar_type(),
          x.size(0),
          x.size(1),
          x.stride(0),
          out.stride(0),
          residual ? residual->stride(0) : 0,
          static_cast<float>(eps),
          static_cast<float>(scale),
          static_cast<float>(offset)};
}

enum class Activation { kSilu, kGelu, kGeluTanh };

struct GatedAct {
  const void* x;
  void* out;
  ScalarType dtype;
  Activation activation;
  int64_t num_tokens, width, x_token, out_token;
  std::vector<int64_t> shard_widths;  // sums to width
};

inline GatedAct make_gated_act(const char* op, const Tensor& x, const Tensor& out,
                               const std::string& activation,
                               const std::optional<std::vector<int64_t>>& shard_widths) {
  check_dim(op, "x", x, 2);
  check_float(op, "x", x);
  check_last_contiguous(op, "x", x);
  TPD_CHECK(op, x.size(1) % 2 == 0, "x must be an even number of columns, got ", x.size(1));
  check_dim(op, "out", out, 2);
  check_size(op, "out", out, 0, x.size(0));
  check_size(op, "out", out, 1, x.size(1) / 2);
  check_same_dtype(op, "out", out, "x", x);
  check_same_device(op, "out", out, "x", x);
  check_last_contiguous(op, "out", out);
  check_output(op, "out", out);
  GatedAct p{x.data_ptr(), out.data_ptr(), x.scalar_type(), Activation::kSilu,
             x.size(0),    out.size(1),    x.stride(0),     out.stride(0)};
  if (activation == "gelu") {
    p.activation = Activation::kGelu;
  } else if (activation == "gelu_tanh") {
    p.activation = Activation::kGeluTanh;
  } else {
    TPD_CHECK(op, activation == "silu", "activation must be silu, gelu or gelu_tanh, got ",
              activation);
  }
  p.shard_widths = shard_widths.value_or(std::vector<int64_t>{p.width});
  int64_t sum = 0;
  for (int64_t width : p.shard_widths) {
    TPD_CHECK(op, width >= 0, "shard_widths must not be negative, got ", width);
    sum += width;
  }
  TPD_CHECK(op, sum == p.width && p.shard_widths.size() <= 64, "shard_widths has ",
            p.shard_widths.size(), " shards that sum to ", sum, ", out is ", p.width,
            " wide (at most 64 shards)");
  return p;
}

// Columns of one matrix and the same columns as contiguous blocks [rows, widths[s]] behind each
// other, one a shard.
struct Shards {
  void *matrix, *blocks;                  // the one that is read is const to its caller
  int64_t rows, width, row_stride, item;  // elements; bytes of one
  std::vector<int64_t> widths;            // of each block, in elements
};

inline Shards make_shards(const char* op, const char* name, const Tensor& matrix,
                          const char* blocks_name, const Tensor& blocks,
                          const std::vector<int64_t>& widths) {
  check_dim(op, name, matrix, 2);
  check_last_contiguous(op, name, matrix);
  check_dim(op, blocks_name, blocks, 1);
  check_contiguous(op, blocks_name, blocks);
  check_float(op, name, matrix);
  check_same_dtype(op, blocks_name, blocks, name, matrix);
  check_same_device(op, blocks_name, blocks, name, matrix);
  check_size(op, blocks_name, blocks, 0, matrix.size(0) * matrix.size(1));
  int64_t sum = 0;
  for (int64_t width : widths) {
    TPD_CHECK(op, width >= 0, "widths must not be negative, got ", width);
    sum += width;
  }
  TPD_CHECK(op, sum == matrix.size(1) && widths.size() <= 64, "widths has ", widths.size(),
            " shards that sum to ", sum, ", ", name, " is ", matrix.size(1),
            " wide (at most 64 shards)");
  return {matrix.data_ptr(),
          blocks.data_ptr(),
          matrix.size(0),
          matrix.size(1),
          matrix.stride(0),
          static_cast<int64_t>(matrix.element_size()),
          widths};
}

inline Shards make_pack_shards(const Tensor& x, const Tensor& out,
                               const std::vector<int64_t>& widths) {
  const Shards p = make_shards("pack_shards", "x", x, "out", out, widths);
  check_output("pack_shards", "out", out);
  return p;
}

inline Shards make_unpack_shards(const Tensor& x, const Tensor& out,
                                 const std::vector<int64_t>& widths) {
  const Shards p = make_shards("unpack_shards", "out", out, "x", x, widths);
  check_output("unpack_shards", "out", out);
  return p;
}

struct Linear {
  const void *x, *weight, *bias;  // bias null if not given
  void* out;
  ScalarType dtype;
  int64_t rows, in, out_features, x_row, weight_row, out_row;
};

inline Linear make_linear(const char* op, const Tensor& x, const Tensor& weight,
                          const OptTensor& bias, const Tensor& out) {
  check_dim(op, "x", x, 2);
  check_dim(op, "weight", weight, 2);
  check_dim(op, "out", out, 2);
  check_float(op, "x", x);
  check_size(op, "weight", weight, 1, x.size(1));
  check_size(op, "out", out, 0, x.size(0));
  check_size(op, "out", out, 1, weight.size(0));
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_same_dtype(op, name, t, "x", x);
    check_same_device(op, name, t, "x", x);
    check_last_contiguous(op, name, t);
  };
  check_like("weight", weight);
  check_like("out", out);
  check_last_contiguous(op, "x", x);
  check_output(op, "out", out);
  if (bias) {
    check_dim(op, "bias", *bias, 1);
    check_size(op, "bias", *bias, 0, weight.size(0));
    check_like("bias", *bias);
  }
  return {x.data_ptr(),     weight.data_ptr(), bias ? bias->data_ptr() : nullptr,
          out.data_ptr(),   x.scalar_type(),   x.size(0),
          x.size(1),        weight.size(0),    x.stride(0),
          weight.stride(0), out.stride(0)};
}

}  // namespace torch_pd
