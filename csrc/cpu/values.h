// Checks of the values inside index tensors, which only the CPU bodies can afford to read first.
#pragma once

#include <algorithm>
#include <vector>

#include "../params/cache.h"

namespace torch_pd {

inline int64_t element_size(ScalarType type) {
  return type == ScalarType::Float ? 4 : is_bytes(type) ? 1 : 2;
}

// Slots are -1 or inside the pool, and no slot is named twice: which token would win is undefined.
inline void check_slots(const char* op, const int64_t* slots, int64_t count, const KVCache& cache) {
  const int64_t limit = cache.num_pages * cache.block_size;
  bool ascending = true;
  int64_t last = -1;
  for (int64_t t = 0; t < count; ++t) {
    TPD_CHECK(op, slots[t] >= -1 && slots[t] < limit, "slot ", slots[t], " at token ", t,
              " is outside the pool of ", cache.num_pages, " pages x ", cache.block_size, " = ",
              limit, " slots");
    if (slots[t] < 0) continue;
    ascending &= slots[t] > last;
    last = slots[t];
  }
  if (ascending) return;  // what a prefill of neighbouring pages looks like
  std::vector<int64_t> sorted(slots, slots + count);
  std::sort(sorted.begin(), sorted.end());
  const auto first = std::lower_bound(sorted.begin(), sorted.end(), int64_t{0});
  const auto twice = std::adjacent_find(first, sorted.end());
  if (twice == sorted.end()) return;
  const int64_t* a = std::find(slots, slots + count, *twice);
  const int64_t* b = std::find(a + 1, slots + count, *twice);
  fail(op, "slot ", *twice, " is written by token ", a - slots, " and by token ", b - slots);
}

// The pools that block table entries name, as the addresses of one layer's K and V in them.
struct LayerPools {
  int64_t count = 1;
  int64_t pages[8];
  const char *k[8], *v[8];
  const float *k_scale[8], *v_scale[8];
};

// A layer lies at the same offset in every pool: row 0 of places is the pool that k_cache is in.
inline LayerPools resolve_places(const char* op, const KVCache& cache, const Places& places) {
  LayerPools pools;
  pools.pages[0] = cache.num_pages;
  pools.k[0] = static_cast<const char*>(cache.k), pools.v[0] = static_cast<const char*>(cache.v);
  pools.k_scale[0] = cache.k_scale, pools.v_scale[0] = cache.v_scale;
  if (places.count == 0) return pools;
  const int64_t item = element_size(cache.dtype);
  const int64_t page_bytes = cache.k_page * item;
  const int64_t base = places.rows[0];
  TPD_CHECK(op, places.rows[1] == cache.num_pages, "row 0 of places has ", places.rows[1],
            " pages, but k_cache has ", cache.num_pages);
  // One stride serves every pool, so all parts of a page must move with it.
  const auto offset_of = [&](const char* name, const void* part, int64_t stride_bytes) {
    const int64_t offset = reinterpret_cast<int64_t>(part) - base;
    TPD_CHECK(op, cache.num_pages <= 1 || stride_bytes == page_bytes, name,
              " has a page stride of ", stride_bytes, " bytes, k_cache of ", page_bytes);
    TPD_CHECK(op, offset >= 0 && (cache.num_pages <= 1 || offset < page_bytes), name, " starts ",
              offset, " bytes from the pool in row 0 of places, outside its first page of ",
              page_bytes, " bytes");
    return offset;
  };
  const int64_t k = offset_of("k_cache", cache.k, page_bytes);
  const int64_t v = offset_of("v_cache", cache.v, cache.v_page * item);
  const bool scaled = cache.k_scale != nullptr;
  const int64_t ks = scaled ? offset_of("k_scale", cache.k_scale, cache.ks_page * 4) : 0;
  const int64_t vs = scaled ? offset_of("v_scale", cache.v_scale, cache.vs_page * 4) : 0;
  pools.count = places.count;
  for (int64_t p = 1; p < places.count; ++p) {
    const int64_t address = places.rows[2 * p], pages = places.rows[2 * p + 1];
    TPD_CHECK(op, pages >= 0 && (address != 0 || pages == 0), "row ", p, " of places has address ",
              address, " and ", pages, " pages");
    const char* pool = reinterpret_cast<const char*>(address);
    pools.pages[p] = pages;
    pools.k[p] = pool + k, pools.v[p] = pool + v;
    pools.k_scale[p] = scaled ? reinterpret_cast<const float*>(pool + ks) : nullptr;
    pools.v_scale[p] = scaled ? reinterpret_cast<const float*>(pool + vs) : nullptr;
  }
  return pools;
}

// Lengths fit the table and every entry that holds tokens names a page of a known pool; entries
// past a sequence's length are never read.
inline void check_tables(const char* op, const Tables& tables, const LayerPools& pools,
                         int64_t block_size) {
  for (int64_t s = 0; s < tables.num_seqs; ++s) {
    const int64_t length = tables.seq_lens[s];
    TPD_CHECK(op, length >= 0 && length <= tables.max_pages * block_size, "sequence ", s, " has ",
              length, " tokens, its table holds ", tables.max_pages, " pages x ", block_size, " = ",
              tables.max_pages * block_size);
    const int32_t* row = tables.block_tables + s * tables.table_stride;
    for (int64_t i = 0; i * block_size < length; ++i) {
      const uint32_t place = static_cast<uint32_t>(row[i]) >> kPlaceShift;
      const int64_t page = row[i] & kPageIndexMask;
      TPD_CHECK(op, place < pools.count, "entry ", row[i], " of sequence ", s, ", page ", i,
                " names place ", place, ", there are ", pools.count);
      TPD_CHECK(op, page < pools.pages[place], "entry ", row[i], " of sequence ", s, ", page ", i,
                " names page ", page, " of place ", place, ", which has ", pools.pages[place]);
    }
  }
}

}  // namespace torch_pd
