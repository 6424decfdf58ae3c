// A paged KV cache as the ops get it: one layer's keys and values, block tables, other pools.
//
// csrc/params/: checked arguments of the ops as plain structs, built once here, used by csrc/cpu
// and csrc/cuda. Everything about shapes, dtypes and devices is checked here. Values inside index
// tensors are checked by the CPU bodies (error) and inside the CUDA kernels (access dropped, flag
// raised).
#pragma once

#include <utility>

#include "../check.h"

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

}  // namespace torch_pd
