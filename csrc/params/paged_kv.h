// Arguments of write_kv, gather_kv and copy_pages.
#pragma once

#include "cache.h"

namespace torch_pd {

// Keys and values of tokens behind each other, k [T, Hkv, Dk] and v [T, Hkv, Dv].
inline void check_kv(const char* op, const Tensor& k, const Tensor& v, const KVCache& cache,
                     const Tensor& k_cache) {
  check_dim(op, "k", k, 3);
  check_dim(op, "v", v, 3);
  check_matches_cache(op, "k", k, k_cache);
  check_matches_cache(op, "v", v, k_cache);
  check_same_dtype(op, "v", v, "k", k);
  check_size(op, "v", v, 0, k.size(0));
  check_size(op, "k", k, 1, cache.num_kv_heads);
  check_size(op, "v", v, 1, cache.num_kv_heads);
  check_size(op, "k", k, 2, cache.k_dim);
  check_size(op, "v", v, 2, cache.v_dim);
  check_last_contiguous(op, "k", k);
  check_last_contiguous(op, "v", v);
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
  check_kv(op, k, v, p.cache, k_cache);
  check_index(op, "slots", slots, ScalarType::Long, 1, "k_cache", k_cache);
  check_size(op, "slots", slots, 0, k.size(0));
  p.k = k.data_ptr(), p.v = v.data_ptr(), p.dtype = k.scalar_type(), p.num_tokens = k.size(0);
  p.k_token = k.stride(0), p.k_head = k.stride(1), p.v_token = v.stride(0), p.v_head = v.stride(1);
  p.slots = static_cast<const int64_t*>(slots.data_ptr());
  return p;
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
  check_kv(op, k, v, p.cache, k_cache);
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

}  // namespace torch_pd
