// write_kv, gather_kv, copy_pages: checks, threads and copies; rows of bytes are in isa/fused.cpp.
#include "../params/paged_kv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "fused.h"
#include "values.h"

namespace torch_pd {

namespace {

constexpr int64_t kGrainBytes = 128 * 1024;
int64_t grain_of(int64_t row_bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
}

// One token's heads, strides in bytes.
void copy_heads(const char* from, int64_t from_head, char* to, int64_t to_head, int64_t heads,
                int64_t head_bytes) {
  if (from_head == head_bytes && to_head == head_bytes) {
    std::memcpy(to, from, heads * head_bytes);
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    std::memcpy(to + h * to_head, from + h * from_head, head_bytes);
  }
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slots, const OptTensor& k_scale, const OptTensor& v_scale) {
  const WriteKV p = make_write_kv("write_kv", k, v, k_cache, v_cache, slots, k_scale, v_scale);
  const KVCache& c = p.cache;
  check_slots("write_kv", p.slots, p.num_tokens, c);
  const int64_t item = element_size(p.dtype);
  const int64_t grain = grain_of(c.num_kv_heads * (c.k_dim + c.v_dim) * item);
  if (c.k_scale) {
    torch::stable::parallel_for(0, p.num_tokens, grain,
                                [&](int64_t b, int64_t e) { write_byte_rows_fn()(p, b, e); });
    return;
  }
  torch::stable::parallel_for(0, p.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (p.slots[t] < 0) continue;
      const int64_t page = p.slots[t] / c.block_size, token = p.slots[t] % c.block_size;
      copy_heads(static_cast<const char*>(p.k) + t * p.k_token * item, p.k_head * item,
                 static_cast<char*>(c.k) + (page * c.k_page + token * c.k_token) * item,
                 c.k_head * item, c.num_kv_heads, c.k_dim * item);
      copy_heads(static_cast<const char*>(p.v) + t * p.v_token * item, p.v_head * item,
                 static_cast<char*>(c.v) + (page * c.v_page + token * c.v_token) * item,
                 c.v_head * item, c.num_kv_heads, c.v_dim * item);
    }
  });
}

void check_kv_start(const GatherKV& p) {
  int64_t start = 0;
  for (int64_t s = 0; s <= p.tables.num_seqs; ++s) {
    TPD_CHECK("gather_kv", p.kv_start[s] == start, "kv_start of sequence ", s, " is ",
              p.kv_start[s], ", the lengths before it sum to ", start);
    if (s < p.tables.num_seqs) start += p.tables.seq_lens[s];
  }
  TPD_CHECK("gather_kv", start == p.num_tokens, "k and v have ", p.num_tokens,
            " tokens, seq_lens sum to ", start);
}

void gather_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
               const Tensor& seq_lens, const Tensor& kv_start, const Tensor& k, const Tensor& v,
               const OptTensor& k_scale, const OptTensor& v_scale, const OptTensor& places) {
  const GatherKV p = make_gather_kv("gather_kv", k_cache, v_cache, block_tables, seq_lens, kv_start,
                                    k, v, k_scale, v_scale, places);
  const KVCache& c = p.cache;
  const LayerPools pools = resolve_places("gather_kv", c, p.places);
  check_tables("gather_kv", p.tables, pools, c.block_size);
  check_kv_start(p);
  const int64_t item = element_size(c.dtype), out_item = element_size(p.dtype);
  const int64_t grain = grain_of(c.num_kv_heads * (c.k_dim + c.v_dim) * out_item);
  torch::stable::parallel_for(0, p.num_tokens, grain, [&](int64_t begin, int64_t end) {
    const int32_t* starts_end = p.kv_start + p.tables.num_seqs + 1;
    int64_t s = std::upper_bound(p.kv_start, starts_end, begin) - p.kv_start - 1;
    for (int64_t t = begin; t < end; ++t) {
      while (t >= p.kv_start[s + 1]) ++s;
      const int64_t position = t - p.kv_start[s], token = position % c.block_size;
      const int32_t entry =
          p.tables.block_tables[s * p.tables.table_stride + position / c.block_size];
      const int place = entry >> kPlaceShift;
      const int64_t page = entry & kPageIndexMask;
      const char* k_from = pools.k[place] + (page * c.k_page + token * c.k_token) * item;
      const char* v_from = pools.v[place] + (page * c.v_page + token * c.v_token) * item;
      char* k_to = static_cast<char*>(p.k) + t * p.k_token * out_item;
      char* v_to = static_cast<char*>(p.v) + t * p.v_token * out_item;
      if (!c.k_scale) {
        copy_heads(k_from, c.k_head * item, k_to, p.k_head * item, c.num_kv_heads, c.k_dim * item);
        copy_heads(v_from, c.v_head * item, v_to, p.v_head * item, c.num_kv_heads, c.v_dim * item);
        continue;
      }
      const float* ks = pools.k_scale[place] + page * c.ks_page + token * c.ks_token;
      const float* vs = pools.v_scale[place] + page * c.vs_page + token * c.vs_token;
      for (int64_t h = 0; h < c.num_kv_heads; ++h) {
        read_bytes_fn()(k_from + h * c.k_head, c.dtype, ks[h], k_to + h * p.k_head * out_item,
                        p.dtype, c.k_dim);
        read_bytes_fn()(v_from + h * c.v_head, c.dtype, vs[h], v_to + h * p.v_head * out_item,
                        p.dtype, c.v_dim);
      }
    }
  });
}

// Every page in its pool, none written twice, none both read and written.
void check_moves(const CopyPages& p) {
  TPD_CHECK("copy_pages", p.dst_pages <= 1 || p.dst_stride >= p.page_bytes, "dst pages of ",
            p.page_bytes, " bytes overlap: their stride is ", p.dst_stride);
  std::vector<int64_t> written(p.num_moves);
  for (int64_t m = 0; m < p.num_moves; ++m) {
    const int64_t src = p.moves[2 * m], dst = p.moves[2 * m + 1];
    TPD_CHECK("copy_pages", src >= 0 && src < p.src_pages, "move ", m, " reads page ", src,
              " of src, which has ", p.src_pages);
    TPD_CHECK("copy_pages", dst >= 0 && dst < p.dst_pages, "move ", m, " writes page ", dst,
              " of dst, which has ", p.dst_pages);
    written[m] = dst;
  }
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  TPD_CHECK("copy_pages", twice == written.end(), "page ", *twice, " of dst is written twice");
  const char* src_end = p.src + (p.src_pages - 1) * p.src_stride + p.page_bytes;
  const char* dst_end = p.dst + (p.dst_pages - 1) * p.dst_stride + p.page_bytes;
  if (p.num_moves == 0 || p.src >= dst_end || p.dst >= src_end) return;
  for (int64_t m = 0; m < p.num_moves; ++m) {
    const char* from = p.src + p.moves[2 * m] * p.src_stride;
    // The first written page that ends behind the start of this one.
    const auto page = std::partition_point(written.begin(), written.end(), [&](int64_t w) {
      return p.dst + w * p.dst_stride + p.page_bytes <= from;
    });
    TPD_CHECK("copy_pages",
              page == written.end() || p.dst + *page * p.dst_stride >= from + p.page_bytes, "move ",
              m, " reads page ", p.moves[2 * m], " of src, whose memory is page ", *page,
              " of dst, which is written");
  }
}

void copy_pages(const Tensor& src, const Tensor& dst, const Tensor& moves) {
  const CopyPages p = make_copy_pages("copy_pages", src, dst, moves);
  check_moves(p);
  if (p.page_bytes == 0) return;
  // Pieces of pages, so that a few pages of some MiB keep every thread busy.
  const int64_t pieces = (p.page_bytes + kGrainBytes - 1) / kGrainBytes;
  const int64_t grain = grain_of(std::min(p.page_bytes, kGrainBytes));
  torch::stable::parallel_for(0, p.num_moves * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t* move = p.moves + i / pieces * 2;
      const int64_t offset = i % pieces * kGrainBytes;
      std::memcpy(p.dst + move[1] * p.dst_stride + offset, p.src + move[0] * p.src_stride + offset,
                  std::min(kGrainBytes, p.page_bytes - offset));
    }
  });
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&torch_pd::write_kv));
  m.impl("gather_kv", TORCH_BOX(&torch_pd::gather_kv));
  m.impl("copy_pages", TORCH_BOX(&torch_pd::copy_pages));
}
