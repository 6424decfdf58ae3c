// write_kv: scattering a step's keys and values into pages.
#include <torch/csrc/stable/library.h>

#include "../params/paged_kv.h"
#include "cache.cuh"
#include "overlap.cuh"

namespace torch_pd {

namespace {

constexpr int kThreads = 128;

struct WriteArgs {
  KVCache cache;
  const void *k, *v;
  int64_t num_tokens;
  Rows rows;
  const int64_t* slots;
  int32_t* flag;
};

template <typename Word>
__device__ __forceinline__ void write_heads(const Heads<1>& heads, Word* to, int64_t stride,
                                            int first, const Vec<Word, 1> (&held)[kHeld]) {
  const int64_t gap = heads.gap(stride);
  to += first;
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int i = first + 32 * u;
    if (i < heads.count) store_vec(to + heads.head(i) * gap + 32 * u, held[u]);
  }
}

// Cache and k, v of one storage type: a warp per token. Word is 16 bytes or one element. The data
// is on its way before the slot is known.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const __grid_constant__ WriteArgs a, const __grid_constant__ Heads<1> k_heads,
                 const __grid_constant__ Heads<1> v_heads) {
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (lane == 0 && token < a.num_tokens) ptx::prefetch_l2(a.slots + token);
  after_previous();
  if (token >= a.num_tokens) return;
  const KVCache& c = a.cache;
  const int64_t place = a.slots[token];
  const Word* k_from = static_cast<const Word*>(a.k) + token * a.rows.k_token;
  const Word* v_from = static_cast<const Word*>(a.v) + token * a.rows.v_token;
  const int count = max(k_heads.count, v_heads.count);
  for (int first = lane; first < count; first += 32 * kHeld) {
    Vec<Word, 1> k[kHeld], v[kHeld];
    read_heads(k_heads, k_from, a.rows.k_head, first, k);
    read_heads(v_heads, v_from, a.rows.v_head, first, v);
    const Slot slot = locate_slot(c, place, a.flag, kWriteKV, first == 0);
    if (slot.page < 0) return;
    write_heads(k_heads, static_cast<Word*>(c.k) + slot.page * c.k_page + slot.token * c.k_token,
                c.k_head, first, k);
    write_heads(v_heads, static_cast<Word*>(c.v) + slot.page * c.v_page + slot.token * c.v_token,
                c.v_head, first, v);
  }
}

// Accesses of one head per lane.
constexpr int kByteHeld = 2, kByteVec = 8;

// A cache of bytes: a group of lanes holds one head of a token, finds its largest magnitude and
// stores it scaled.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_bytes_kernel(const __grid_constant__ WriteArgs a, const int lane_bits,
                       const FastDiv heads) {
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1);
  const uint32_t item = (blockIdx.x * kThreads + threadIdx.x) >> lane_bits;
  const int64_t token = heads.div(item);
  const int index = static_cast<int>(item - heads.div(item) * heads.divisor);
  const bool active = token < a.num_tokens;
  const KVCache& c = a.cache;
  const int kv_heads = static_cast<int>(c.num_kv_heads);
  const bool is_k = index < kv_heads;
  const int head = is_k ? index : index - kv_heads;
  const int dim = static_cast<int>(is_k ? c.k_dim : c.v_dim);
  const T* from = is_k ? static_cast<const T*>(a.k) + token * a.rows.k_token + head * a.rows.k_head
                       : static_cast<const T*>(a.v) + token * a.rows.v_token + head * a.rows.v_head;
  constexpr int kLine = 128 / sizeof(T);
  if (active && lane * kLine < dim) ptx::prefetch_l2(from + lane * kLine);
  after_previous();
  const int64_t place = active ? a.slots[token] : -1;
  Vec<T, kByteVec> in[kByteHeld];
#pragma unroll
  for (int i = 0; i < kByteHeld; ++i) {
    const int column = (lane + i * lanes) * kByteVec;
    in[i] = {};
    if (active && column < dim) in[i] = load_vec<kByteVec>(from + column);
  }
  float amax[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kByteHeld; ++i) {
#pragma unroll
    for (int e = 0; e < kByteVec; ++e) {
      amax[0] = ptx::max_nan(amax[0], fabsf(to_float(in[i].at[e])));
    }
  }
  group_maxima(amax, lanes);
  const Slot slot = locate_slot(c, place, a.flag, kWriteKV, index == 0 && lane == 0);
  if (slot.page < 0) return;
  const bool int8 = c.dtype == ScalarType::Char;
  const float scale = byte_scale(amax[0], int8);
  const float inverse = 1.0f / scale;
  uint8_t* to = is_k ? static_cast<uint8_t*>(c.k) + slot.page * c.k_page + slot.token * c.k_token +
                           head * c.k_head
                     : static_cast<uint8_t*>(c.v) + slot.page * c.v_page + slot.token * c.v_token +
                           head * c.v_head;
#pragma unroll
  for (int i = 0; i < kByteHeld; ++i) {
    const int column = (lane + i * lanes) * kByteVec;
    if (column >= dim) continue;
    float x[kByteVec];
    keep_packed(in[i]);
    widen(in[i], x);
    store_bytes(to + column, x, inverse, int8);
  }
  if (lane == 0) {
    (is_k ? c.k_scale + slot.page * c.ks_page + slot.token * c.ks_token
          : c.v_scale + slot.page * c.vs_page + slot.token * c.vs_token)[head] = scale;
  }
}

// A cache of bytes, heads of any width and alignment, read twice: `lanes` threads per head.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_bytes_plain_kernel(const WriteArgs a, const int lanes, const FastDiv heads) {
  after_previous();
  const int lane = threadIdx.x % lanes;
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / lanes;
  const int64_t token = heads.div(static_cast<uint32_t>(item));
  if (token >= a.num_tokens) return;  // whole groups of lanes leave; see the mask below
  const KVCache& c = a.cache;
  const int index = static_cast<int>(item - token * heads.divisor);
  const bool is_k = index < c.num_kv_heads;
  const int head = is_k ? index : index - static_cast<int>(c.num_kv_heads);
  const int dim = static_cast<int>(is_k ? c.k_dim : c.v_dim);
  const T* from = is_k ? static_cast<const T*>(a.k) + token * a.rows.k_token + head * a.rows.k_head
                       : static_cast<const T*>(a.v) + token * a.rows.v_token + head * a.rows.v_head;
  float amax = 0.0f;
  for (int i = lane; i < dim; i += lanes) {
    amax = ptx::max_nan(amax, fabsf(to_float(from[i])));
  }
  const unsigned group = (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1)
                         << (threadIdx.x % 32 / lanes * lanes);
  for (int step = lanes / 2; step > 0; step /= 2) {
    amax = ptx::max_nan(amax, __shfl_xor_sync(group, amax, step));
  }
  const Slot slot = locate_slot(c, a.slots[token], a.flag, kWriteKV, index == 0 && lane == 0);
  if (slot.page < 0) return;
  const bool int8 = c.dtype == ScalarType::Char;
  const float scale = byte_scale(amax, int8), inverse = 1.0f / scale;
  uint8_t* to = is_k ? static_cast<uint8_t*>(c.k) + slot.page * c.k_page + slot.token * c.k_token +
                           head * c.k_head
                     : static_cast<uint8_t*>(c.v) + slot.page * c.v_page + slot.token * c.v_token +
                           head * c.v_head;
  for (int i = lane; i < dim; i += lanes) {
    const float x[1] = {to_float(from[i])};
    store_bytes(to + i, x, inverse, int8);
  }
  if (lane == 0) {
    (is_k ? c.k_scale + slot.page * c.ks_page + slot.token * c.ks_token
          : c.v_scale + slot.page * c.vs_page + slot.token * c.vs_token)[head] = scale;
  }
}

void check_count(int64_t count) {
  TPD_CHECK("write_kv", count < (int64_t{1} << 31), count,
            " threads in one launch, at most 2^31 - 1");
}

// T: type of k and v; the cache is of bytes.
template <typename T>
void launch_bytes(const WriteKV& p, const WriteArgs& a, const Launch& launch) {
  const int64_t heads = 2 * p.cache.num_kv_heads;
  const int64_t dim = std::max(p.cache.k_dim, p.cache.v_dim);
  if (bytes_aligned<T>(p.cache, p.k, p.v, a.rows) && dim <= 32 * kByteHeld * kByteVec) {
    int lane_bits = 0;
    while (dim > (kByteHeld * kByteVec) << lane_bits) ++lane_bits;
    const int64_t blocks = ceil_div(p.num_tokens * heads << lane_bits, kThreads);
    check_count(blocks * kThreads);
    start_overlapped(launch, write_bytes_kernel<T>, blocks, kThreads, a, lane_bits, FastDiv(heads));
    return;
  }
  const int lanes = lanes_for(dim);
  const int64_t blocks = ceil_div(p.num_tokens * heads * lanes, kThreads);
  check_count(blocks * kThreads);
  start_overlapped(launch, write_bytes_plain_kernel<T>, blocks, kThreads, a, lanes, FastDiv(heads));
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slots, const OptTensor& k_scale, const OptTensor& v_scale) {
  const char* op = "write_kv";
  const WriteKV p = make_write_kv(op, k, v, k_cache, v_cache, slots, k_scale, v_scale);
  if (p.num_tokens == 0) return;
  const Launch launch(op, k_cache);
  const Rows rows{p.k_token, p.k_head, p.v_token, p.v_head};
  WriteArgs a{p.cache, p.k, p.v, p.num_tokens, rows, p.slots, error_flag(op, launch.device)};
  if (p.cache.k_scale) {
    dispatch_float(op, p.dtype, [&](auto* type) {
      launch_bytes<std::remove_pointer_t<decltype(type)>>(p, a, launch);
    });
    return;
  }
  const int64_t item = p.dtype == ScalarType::Float ? 4 : 2;
  dispatch_word(p.cache, p.k, p.v, rows, item, [&](auto* type, int64_t wide) {
    using Word = std::remove_pointer_t<decltype(type)>;
    a.cache = in_words(p.cache, wide);
    a.rows = in_words(rows, wide);
    start_overlapped(launch, write_kernel<Word>, ceil_div(p.num_tokens, kThreads / 32), kThreads, a,
                     Heads<1>(a.cache.num_kv_heads, a.cache.k_dim),
                     Heads<1>(a.cache.num_kv_heads, a.cache.v_dim));
  });
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) { m.impl("write_kv", TORCH_BOX(&torch_pd::write_kv)); }
