// Addresses inside a paged KV pool, and float8 storage, for the kernels that read or write pages.
#pragma once

#include "../params.h"
#include "vec.cuh"

namespace torch_pd {

// Largest float8_e4m3fn value: a head's largest magnitude is stored as this, times its scale.
constexpr float kFp8Max = 448.0f;

__host__ __device__ inline int block_shift(int64_t block_size) {
  return block_size == 16 ? 4 : block_size == 32 ? 5 : 6;  // params.h allows no other
}

// A slot split into page and token of the page; page -1 is padding or (raised) outside the pool.
struct Slot {
  int64_t page;
  int token;
};

__device__ __forceinline__ Slot locate_slot(const KVCache& cache, int64_t slot, int32_t* flag,
                                            DeviceOp op, bool reports) {
  const int shift = block_shift(cache.block_size);
  const int64_t page = slot >> shift;
  if (slot < 0 || page >= cache.num_pages) {
    if (slot != -1 && reports) raise_flag(flag, op, kBadSlot, slot);
    return {-1, 0};
  }
  return {page, static_cast<int>(slot & (cache.block_size - 1))};
}

// The same cache seen as words of `per_word` elements.
inline KVCache in_words(KVCache c, int64_t per_word) {
  for (int64_t* n :
       {&c.k_dim, &c.v_dim, &c.k_page, &c.k_token, &c.k_head, &c.v_page, &c.v_token, &c.v_head}) {
    *n /= per_word;
  }
  return c;
}

// True if every head starts at a multiple of `bytes` and is a multiple of `elements` wide.
inline bool cache_aligned(const KVCache& c, int64_t item, int64_t bytes, int64_t elements) {
  bool yes = aligned(c.k, bytes) && aligned(c.v, bytes);
  for (int64_t n : {c.k_page, c.k_token, c.k_head, c.v_page, c.v_token, c.v_head}) {
    yes = yes && n * item % bytes == 0;
  }
  return yes && c.k_dim % elements == 0 && c.v_dim % elements == 0;
}

// Scale of a head of largest magnitude `amax`; values are stored divided by it, as on the CPU.
__device__ __forceinline__ float fp8_scale(float amax) {
  const float scale = amax / kFp8Max;
  return scale > 0.0f ? scale : 1.0f;
}

// Number of threads that share `count` accesses of one head: a power of two, at most a warp.
inline int lanes_for(int64_t count) {
  int lanes = 1;
  while (lanes < 32 && lanes < count) lanes *= 2;
  return lanes;
}

}  // namespace torch_pd
