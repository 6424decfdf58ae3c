#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <vector>

#include "../params/attention.h"
#include "scratch.h"
#include "values.h"

namespace torch_pd {

namespace {

// Rows (query tokens x heads of a group) that share a tile of K and V: more reuse it better, fewer
// spread better over threads. The result does not depend on it.
constexpr int64_t kMostRows = 128;
constexpr int64_t kFewRows = 32;
constexpr int64_t kItemsPerThread = 4;
// Splits of one item go to several threads only while their partial results stay below this.
constexpr int64_t kPartialFloats = int64_t{64} << 20;

void check_queries(const char* op, const Attention& p) {
  const int32_t* start = p.query_start;
  const int64_t seqs = p.tables.num_seqs;
  TPD_CHECK(op, start[0] == 0 && start[seqs] == p.num_tokens, "query_start must run from 0 to ",
            p.num_tokens, " tokens, got ", start[0], " to ", start[seqs]);
  for (int64_t s = 0; s < seqs; ++s) {
    TPD_CHECK(op, start[s] <= start[s + 1], "query_start must not fall, got ", start[s], " then ",
              start[s + 1], " at sequence ", s);
  }
  for (int64_t s = 0; s < seqs; ++s) {
    const int64_t queries = start[s + 1] - start[s];
    TPD_CHECK(op, queries <= p.tables.seq_lens[s], "sequence ", s, " has ", queries,
              " queries but only ", p.tables.seq_lens[s], " tokens");
    TPD_CHECK(op, queries <= p.max_query_len, "sequence ", s, " has ", queries,
              " queries, max_query_len is ", p.max_query_len);
  }
}

AttentionCall make_call(const Attention& p, const LayerPools& pools) {
  AttentionCall c{};
  c.q = p.q, c.out = p.out, c.lse = p.lse, c.sinks = p.sinks;
  c.dtype = p.dtype, c.bytes = p.cache.k_scale != nullptr;
  c.int8 = p.cache.dtype == ScalarType::Char;
  for (int64_t i = 0; i < pools.count; ++i) {
    c.k[i] = pools.k[i], c.v[i] = pools.v[i];
    c.k_scale[i] = pools.k_scale[i], c.v_scale[i] = pools.v_scale[i];
  }
  c.k_page = p.cache.k_page, c.k_token = p.cache.k_token, c.k_head = p.cache.k_head;
  c.v_page = p.cache.v_page, c.v_token = p.cache.v_token, c.v_head = p.cache.v_head;
  c.ks_page = p.cache.ks_page, c.ks_token = p.cache.ks_token;
  c.vs_page = p.cache.vs_page, c.vs_token = p.cache.vs_token;
  c.block_tables = p.tables.block_tables, c.table_stride = p.tables.table_stride;
  c.page_shift = std::countr_zero(static_cast<uint64_t>(p.cache.block_size));
  c.group = p.num_heads / p.cache.num_kv_heads;
  c.k_dim = p.cache.k_dim, c.v_dim = p.cache.v_dim;
  c.q_token = p.q_token, c.q_head = p.q_head, c.out_token = p.out_token, c.out_head = p.out_head;
  c.lse_token = p.lse_token, c.window = p.window, c.scale = p.scale, c.soft_cap = p.soft_cap;
  return c;
}

// Cuts the queries into items of up to `tokens` queries; of a sequence the last, longest ones
// first.
std::vector<AttentionItem> make_items(const Attention& p, int64_t tokens) {
  std::vector<AttentionItem> items;
  for (int64_t s = 0; s < p.tables.num_seqs; ++s) {
    const int64_t queries = p.query_start[s + 1] - p.query_start[s];
    for (int64_t end = queries; end > 0; end -= std::min(end, tokens)) {
      const int64_t first = std::max<int64_t>(0, end - tokens);
      const int64_t position = p.tables.seq_lens[s] - queries + first;
      const int64_t start_key = p.window ? std::max<int64_t>(0, position - p.window + 1) : 0;
      const int64_t stop_key = position + end - first;
      for (int64_t h = 0; h < p.cache.num_kv_heads; ++h) {
        items.push_back({static_cast<int32_t>(s), static_cast<int32_t>(h), p.query_start[s] + first,
                         position, static_cast<int32_t>(end - first),
                         static_cast<int32_t>(start_key / kSplitKeys),
                         static_cast<int32_t>((stop_key + kSplitKeys - 1) / kSplitKeys), nullptr});
      }
    }
  }
  return items;
}

// Calls work(i, after) for i = 0 .. count; after: what this thread probably does next, or -1. Each
// thread takes a few when it is free: items differ in cost. work must not throw.
template <typename F>
void run_items(int64_t count, const F& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  const int64_t step = std::clamp<int64_t>(count / (8 * threads + 1), 1, 16);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(step, std::memory_order_relaxed)) < count;) {
      const int64_t end = std::min(i + step, count);
      for (; i < end; ++i) {
        const int64_t after = i + 1 < end ? i + 1 : next.load(std::memory_order_relaxed);
        work(i, after < count ? after : -1);
      }
    }
  });
}

void paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start,
                     Tensor out, double scale, int64_t max_query_len, int64_t window,
                     double soft_cap, const OptTensor& sinks, const OptTensor& k_scale,
                     const OptTensor& v_scale, const OptTensor& places, OptTensor lse) {
  const char* op = "paged_attention";
  const Attention p =
      make_attention(op, q, k_cache, v_cache, block_tables, seq_lens, query_start, out, scale,
                     max_query_len, window, soft_cap, sinks, k_scale, v_scale, places, lse);
  const LayerPools pools = resolve_places(op, p.cache, p.places);
  check_tables(op, p.tables, pools, p.cache.block_size);
  check_queries(op, p);
  const AttentionCall c = make_call(p, pools);

  const int64_t enough = kItemsPerThread * torch::stable::get_num_threads();
  int64_t tokens = std::max<int64_t>(1, kMostRows / c.group);
  std::vector<AttentionItem> items = make_items(p, tokens);
  while (static_cast<int64_t>(items.size()) < enough && tokens > 1 && tokens * c.group > kFewRows &&
         tokens / 2 < p.max_query_len) {
    tokens /= 2;
    items = make_items(p, tokens);
  }
  int64_t rows = 0, splits = 0, partial_floats = 0;
  for (const AttentionItem& item : items) {
    const int64_t n = item.split_end - item.split_begin;
    rows = std::max(rows, item.tokens * c.group);
    splits += n;
    partial_floats += n * attention_partial_size(item.tokens * c.group, c.v_dim);
  }
  const int64_t size = attention_scratch_size(rows, c.k_dim, c.v_dim);
  const auto run_all = [&](const std::vector<AttentionItem>& list) {
    run_items(list.size(), [&](int64_t i, int64_t after) {
      attention_item_fn()(c, list[i], after < 0 ? nullptr : &list[after], scratch_floats(size));
    });
  };
  const auto count = static_cast<int64_t>(items.size());
  if (count >= enough || splits == count || partial_floats > kPartialFloats) {
    run_all(items);
    return;
  }
  // Few items of many keys: their splits are items of their own, merged afterwards.
  const auto partial = std::make_unique_for_overwrite<float[]>(partial_floats);
  std::vector<AttentionItem> parts;
  float* at = partial.get();
  for (AttentionItem& item : items) {
    item.partial = at;
    for (int32_t s = item.split_begin; s < item.split_end; ++s) {
      AttentionItem& part = parts.emplace_back(item);
      part.split_begin = s, part.split_end = s + 1, part.partial = at;
      at += attention_partial_size(item.tokens * c.group, c.v_dim);
    }
  }
  run_all(parts);
  run_items(count,
            [&](int64_t i, int64_t) { attention_finish_fn()(c, items[i], scratch_floats(size)); });
}

void merge_attention(Tensor out, Tensor lse, const Tensor& other, const Tensor& other_lse) {
  const MergeAttention p = make_merge_attention("merge_attention", out, lse, other, other_lse);
  const MergeRows r{p.out,
                    p.other,
                    p.lse,
                    p.other_lse,
                    p.dtype,
                    p.num_heads,
                    p.head_dim,
                    p.out_token,
                    p.out_head,
                    p.other_token,
                    p.other_head,
                    p.lse_token,
                    p.other_lse_token};
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.head_dim));
  torch::stable::parallel_for(0, p.num_tokens * p.num_heads, grain,
                              [&](int64_t begin, int64_t end) { merge_rows_fn()(r, begin, end); });
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&torch_pd::paged_attention));
  m.impl("merge_attention", TORCH_BOX(&torch_pd::merge_attention));
}
