// Addresses inside a paged KV pool, and storage as bytes, for the kernels that read or write pages.
#pragma once

#include "../params/cache.h"
#include "ptx.cuh"
#include "vec.cuh"

namespace torch_pd {

__host__ __device__ inline int block_shift(int64_t block_size) {
  return block_size == 16 ? 4 : block_size == 32 ? 5 : 6;  // params/cache.h allows no other
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

// Strides of one token's K and V heads, in elements.
struct Rows {
  int64_t k_token, k_head, v_token, v_head;
};

// Calls f with a null pointer of the widest word that every access of both sides is a multiple of.
template <typename F>
inline void dispatch_word(const KVCache& c, const void* k, const void* v, const Rows& rows,
                          int64_t item, F&& f) {
  const int64_t wide = 16 / item;
  bool fits = cache_aligned(c, item, 16, wide) && aligned(k, 16) && aligned(v, 16);
  for (int64_t n : {rows.k_token, rows.k_head, rows.v_token, rows.v_head}) {
    fits = fits && n % wide == 0;
  }
  if (fits) {
    f(static_cast<uint4*>(nullptr), wide);
  } else if (item == 4) {
    f(static_cast<uint32_t*>(nullptr), int64_t{1});
  } else {
    f(static_cast<uint16_t*>(nullptr), int64_t{1});
  }
}

inline Rows in_words(const Rows& r, int64_t n) {
  return {r.k_token / n, r.k_head / n, r.v_token / n, r.v_head / n};
}

// True if 8 elements of both sides of a cache of bytes can move as one access.
template <typename T>
inline bool bytes_aligned(const KVCache& c, const void* k, const void* v, const Rows& rows) {
  bool yes = cache_aligned(c, 1, 8, 8) && aligned(k, 16) && aligned(v, 16);
  for (int64_t n : {rows.k_token, rows.k_head, rows.v_token, rows.v_head}) {
    yes = yes && n * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  }
  return yes;
}

// Scale of a head of largest magnitude `amax`; as on the CPU: 1 if that is not a normal number (all
// is stored as 0), NaN if amax is NaN or infinite: then all of the head reads as NaN.
__device__ __forceinline__ float byte_scale(float amax, bool int8) {
  const float scale = amax / (int8 ? kInt8Max : kFloat8Max);
  return scale < 0x1p-126f ? 1.0f : scale;
}

// Stores N values of a head as bytes, times the inverse of its scale.
template <int N>
__device__ __forceinline__ void store_bytes(uint8_t* to, const float (&x)[N], float inverse,
                                            bool int8) {
  float q[N];
#pragma unroll
  for (int e = 0; e < N; ++e) q[e] = x[e] * inverse;
  if (int8) {
    store_vec(reinterpret_cast<int8_t*>(to), narrow<int8_t, N>(q));
  } else {
    store_vec(reinterpret_cast<Float8*>(to), narrow<Float8, N>(q));
  }
}

// One token's K or V heads as accesses of VEC elements, numbered through.
template <int VEC>
struct Heads {
  int count;
  FastDiv width;  // accesses of one head
  Heads(int64_t heads, int64_t dim)
      : count(static_cast<int>(heads * dim / VEC)), width(dim / VEC) {}
  __device__ __forceinline__ int head(int i) const { return static_cast<int>(width.div(i)); }
  // Elements between the end of a head and the next, in a tensor with this stride of heads.
  __device__ __forceinline__ int64_t gap(int64_t stride) const {
    return stride - static_cast<int64_t>(width.divisor) * VEC;
  }
};

// A warp moves a token: each lane holds kHeld accesses of its K or V, first, first + 32 and so on.
constexpr int kHeld = 4;

// Brings a token's K or V to the L2 cache. Lanes 0 to 31 of a warp call it together.
template <int VEC, typename T>
__device__ __forceinline__ void prefetch_heads(const Heads<VEC>& heads, const T* from,
                                               int64_t stride) {
  constexpr int kLine = 128 / (sizeof(T) * VEC);  // accesses
  const int64_t gap = heads.gap(stride);
  for (int i = static_cast<int>(threadIdx.x % 32) * kLine; i < heads.count; i += 32 * kLine) {
    ptx::prefetch_l2(from + i * VEC + heads.head(i) * gap);
  }
}

template <int VEC, typename T>
__device__ __forceinline__ void read_heads(const Heads<VEC>& heads, const T* from, int64_t stride,
                                           int first, Vec<T, VEC> (&held)[kHeld]) {
  const int64_t gap = heads.gap(stride);
  from += first * VEC;
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int i = first + 32 * u;
    if (i < heads.count) held[u] = load_vec<VEC>(from + heads.head(i) * gap + 32 * u * VEC);
  }
}

// Number of threads that share `count` accesses of one head: a power of two, at most a warp.
inline int lanes_for(int64_t count) {
  int lanes = 1;
  while (lanes < 32 && lanes < count) lanes *= 2;
  return lanes;
}

}  // namespace torch_pd
