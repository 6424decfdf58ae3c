// rope_write_kv: q/k norm, rotation and KV write in one pass over the merged projection. A group of
// `lanes` threads takes one head of one token; a thread holds both halves of each pair it rotates,
// so only the norm crosses lanes.
#include <torch/csrc/stable/library.h>

#include "../params/rope_write_kv.h"
#include "cache.cuh"
#include "overlap.cuh"

namespace torch_pd {

namespace {

constexpr int kThreads = 128;

struct RopeArgs {
  KVCache cache;
  const void* qkv;
  void* q;
  const int64_t* slots;
  const void *cos, *sin, *q_norm, *k_norm;
  int64_t num_tokens, qkv_token, q_token, q_head, cos_token, sin_token;
  int num_heads, head_dim, rope_dim, group;  // group: query heads per KV head
  bool norm_whole, blocked;
  float eps, norm_offset;
  int lanes, lane_bits;  // lanes = 1 << lane_bits
  int heads;             // of a row of qkv: num_heads + 2 * num_kv_heads
  FastDiv per_token{1};  // by `heads`
  int32_t* flag;
  int start[kMaxShards + 1];  // first KV head of a shard
};

// What a column of heads of the merged row is, and which head of that kind.
enum Kind { kQuery, kKey, kValue };
struct Head {
  Kind kind;
  int index;
};

__device__ __forceinline__ Head head_of(const RopeArgs& a, int column) {
  const int span = a.group + 2;  // heads of the row per KV head
  int shard = 0;
  while (column >= a.start[shard + 1] * span) ++shard;
  const int first = a.start[shard], kv_heads = a.start[shard + 1] - first;
  const int local = column - first * span, queries = kv_heads * a.group;
  if (local < queries) return {kQuery, first * a.group + local};
  if (local < queries + kv_heads) return {kKey, first + local - queries};
  return {kValue, first + local - queries - kv_heads};
}

// Where a column of heads of a token lies.
template <typename T>
__device__ __forceinline__ const T* column_of(const RopeArgs& a, int64_t token, int column) {
  const T* qkv = static_cast<const T*>(a.qkv);
  if (!a.blocked) return qkv + token * a.qkv_token + int64_t{column} * a.head_dim;
  const int span = a.group + 2;
  int shard = 0;
  while (column >= a.start[shard + 1] * span) ++shard;
  const int64_t before = a.start[shard] * span, heads = a.start[shard + 1] * span - before;
  return qkv + (a.num_tokens * before + token * heads + column - before) * a.head_dim;
}

// A thread's columns: PAIRS times two runs of VEC values, [p][0] and [p][1], which are rotated
// against each other or (behind rope_dim) just neighbours. head_dim: none.
template <int PAIRS>
struct Columns {
  int at[PAIRS][2];
};

template <int VEC, int PAIRS>
__device__ __forceinline__ Columns<PAIRS> columns_of(const RopeArgs& a, int lane) {
  Columns<PAIRS> columns;
  const int half = a.rope_dim / 2;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = (lane + p * a.lanes) * VEC;
    const bool rotated = i < half;
    columns.at[p][0] = min(rotated ? i : 2 * i, a.head_dim);
    columns.at[p][1] = min(rotated ? half + i : 2 * i + VEC, a.head_dim);
  }
  return columns;
}

template <typename T, int VEC, int PAIRS>
struct Part {
  Vec<T, VEC> at[PAIRS][2];
};

// One head's (or norm weight's) values of a thread; zeros if not active.
template <typename T, int VEC, int PAIRS>
__device__ __forceinline__ void read_part(const RopeArgs& a, const Columns<PAIRS>& columns,
                                          const T* from, bool active, Part<T, VEC, PAIRS>& part) {
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int column = columns.at[p][s];
      part.at[p][s] = {};
      if (active && column < a.head_dim) part.at[p][s] = load_vec<VEC>(from + column);
    }
  }
}

template <typename T, int VEC, int PAIRS>
__device__ __forceinline__ float squares_of(const Part<T, VEC, PAIRS>& part) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PAIRS * 2 * VEC; ++i) {
    const float x = to_float(part.at[i / (2 * VEC)][i / VEC % 2].at[i % VEC]);
    sum += x * x;
  }
  return sum;
}

// cos and sin of one run of pairs: of their first and of their second values.
template <typename R, int VEC>
struct Rotation {
  Vec<R, VEC> cos[2], sin[2];
};

template <typename R, int VEC>
__device__ __forceinline__ void read_rotation(const RopeArgs& a, int64_t token, int column,
                                              Rotation<R, VEC>& rotation) {
  const int half = a.rope_dim / 2;
  if (column >= half) return;
  const R* cos = static_cast<const R*>(a.cos) + token * a.cos_token + column;
  const R* sin = static_cast<const R*>(a.sin) + token * a.sin_token + column;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    rotation.cos[s] = load_vec<VEC>(cos + s * half);
    rotation.sin[s] = load_vec<VEC>(sin + s * half);
  }
}

// Where a head goes; `to` null: nowhere (padding, or a slot outside the pool).
struct Target {
  void* to;
  float* scale;  // of a cache of bytes
};

__device__ __forceinline__ Target target_of(const RopeArgs& a, int64_t token, int64_t place,
                                            Head head, int item, bool reports) {
  if (head.kind == kQuery) {
    return {static_cast<char*>(a.q) + (token * a.q_token + head.index * a.q_head) * item, nullptr};
  }
  const KVCache& c = a.cache;
  const bool is_k = head.kind == kKey;
  const Slot slot = locate_slot(c, place, a.flag, kRopeWriteKV, reports && is_k && head.index == 0);
  if (slot.page < 0) return {nullptr, nullptr};
  const int64_t at = is_k ? slot.page * c.k_page + slot.token * c.k_token + head.index * c.k_head
                          : slot.page * c.v_page + slot.token * c.v_token + head.index * c.v_head;
  float* scale = is_k ? c.k_scale : c.v_scale;
  if (scale == nullptr) return {static_cast<char*>(is_k ? c.k : c.v) + at * item, nullptr};
  scale += (is_k ? slot.page * c.ks_page + slot.token * c.ks_token
                 : slot.page * c.vs_page + slot.token * c.vs_token) +
           head.index;
  return {static_cast<char*>(is_k ? c.k : c.v) + at, scale};
}

// Rotates one head and stores it. All threads of a warp call it together. `factor`: 1 / rms.
template <typename T, typename R, int VEC, int PAIRS>
__device__ __forceinline__ void finish_head(const RopeArgs& a, int64_t token, const Target& target,
                                            Kind kind, int lane, const Columns<PAIRS>& columns,
                                            const Part<T, VEC, PAIRS>& part,
                                            const Part<T, VEC, PAIRS>& weight, float factor,
                                            Rotation<R, VEC> rotation) {
  const bool normed = a.q_norm != nullptr && kind != kValue;
  float x[PAIRS][2][VEC];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      widen(part.at[p][s], x[p][s]);
      if (!normed) continue;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        x[p][s][e] *= factor * (a.norm_offset + to_float(weight.at[p][s].at[e]));
      }
    }
    if (kind == kValue || columns.at[p][0] >= a.rope_dim / 2) continue;
    if (PAIRS > 1) read_rotation(a, token, columns.at[p][0], rotation);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const float first = x[p][0][e], second = x[p][1][e];
      x[p][0][e] =
          first * to_float(rotation.cos[0].at[e]) - second * to_float(rotation.sin[0].at[e]);
      x[p][1][e] =
          second * to_float(rotation.cos[1].at[e]) + first * to_float(rotation.sin[1].at[e]);
    }
  }
  const bool int8 = a.cache.dtype == ScalarType::Char;
  float scale = 1.0f;
  if (a.cache.k_scale != nullptr && __ballot_sync(0xffffffffu, kind != kQuery) != 0) {
    float amax[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < PAIRS * 2 * VEC; ++i) {
      amax[0] = ptx::max_nan(amax[0], fabsf(x[i / (2 * VEC)][i / VEC % 2][i % VEC]));
    }
    group_maxima(amax, a.lanes);
    scale = byte_scale(amax[0], int8);
  }
  if (target.to == nullptr) return;
  if (target.scale != nullptr && lane == 0) *target.scale = scale;
  const float inverse = 1.0f / scale;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int column = columns.at[p][s];
      if (column >= a.head_dim) continue;
      if (target.scale != nullptr) {
        store_bytes(static_cast<uint8_t*>(target.to) + column, x[p][s], inverse, int8);
      } else {
        store_vec(static_cast<T*>(target.to) + column, narrow<T, VEC>(x[p][s]));
      }
    }
  }
}

// No norm, or one per head: a group of lanes takes one head of one token. More heads a group would
// share cos, sin and the norm weight, but those come from the L1 cache anyway, and fewer registers
// let more groups be on their way.
template <typename T, typename R, int VEC, int PAIRS>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ RopeArgs a) {
  const int lane = threadIdx.x & (a.lanes - 1);
  const uint32_t item = (blockIdx.x * kThreads + threadIdx.x) >> a.lane_bits;
  const int64_t token = a.per_token.div(item);
  const int column = static_cast<int>(item - a.per_token.div(item) * a.per_token.divisor);
  const bool active = token < a.num_tokens;
  const auto columns = columns_of<VEC, PAIRS>(a, lane);
  after_previous();
  const int64_t place = active ? a.slots[token] : -1;
  Part<T, VEC, PAIRS> part, weight;
  read_part(a, columns, column_of<T>(a, token, column), active, part);
  Rotation<R, VEC> rotation;
  if (PAIRS == 1 && active) read_rotation(a, token, columns.at[0][0], rotation);
  const Head head = head_of(a, column);
  const void* norm = head.kind == kQuery ? a.q_norm : a.k_norm;
  read_part(a, columns, static_cast<const T*>(norm), norm != nullptr && head.kind != kValue,
            weight);
  float factor[1] = {squares_of(part)};
  if (a.q_norm != nullptr) group_sums(factor, a.lanes);
  factor[0] = rsqrtf(factor[0] / static_cast<float>(a.head_dim) + a.eps);
  const Target target =
      active ? target_of(a, token, place, head, sizeof(T), lane == 0) : Target{nullptr, nullptr};
  if (PAIRS == 1) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      keep_packed(part.at[0][i]), keep_packed(weight.at[0][i]);
      keep_packed(rotation.cos[i]), keep_packed(rotation.sin[i]);
    }
  }
  finish_head<T, R, VEC, PAIRS>(a, token, target, head.kind, lane, columns, part, weight, factor[0],
                                rotation);
}

// One norm over all q heads and one over all k heads: a block per token, which reads q and k again
// (from cache) once the norms are known.
template <typename T, typename R, int VEC, int PAIRS>
__global__ void __launch_bounds__(kThreads) rope_whole_kernel(const __grid_constant__ RopeArgs a) {
  __shared__ float partial[2][kThreads / 32];
  const int lane = threadIdx.x & (a.lanes - 1), group = threadIdx.x >> a.lane_bits;
  const int groups = kThreads >> a.lane_bits;
  const int64_t token = blockIdx.x;
  const auto columns = columns_of<VEC, PAIRS>(a, lane);
  after_previous();
  const int64_t place = a.slots[token];
  Part<T, VEC, PAIRS> part, weight;
  float q_squares = 0.0f, k_squares = 0.0f;
  for (int column = group; column < a.heads; column += groups) {
    const Kind kind = head_of(a, column).kind;
    if (kind == kValue) continue;
    read_part(a, columns, column_of<T>(a, token, column), true, part);
    (kind == kKey ? k_squares : q_squares) += squares_of(part);
  }
  const float q_count = static_cast<float>(a.num_heads * a.head_dim);
  const float k_count = static_cast<float>(a.cache.num_kv_heads * a.head_dim);
  const float q_factor = rsqrtf(block_sum(q_squares, partial[0]) / q_count + a.eps);
  const float k_factor = rsqrtf(block_sum(k_squares, partial[1]) / k_count + a.eps);
  Rotation<R, VEC> rotation;
  if (PAIRS == 1) read_rotation(a, token, columns.at[0][0], rotation);
  for (int first = 0; first < a.heads; first += groups) {  // whole warps stay together
    const int column = first + group;
    const bool active = column < a.heads;
    const Head head = head_of(a, active ? column : 0);
    const T* norm = static_cast<const T*>(head.kind == kQuery ? a.q_norm : a.k_norm);
    read_part(a, columns, column_of<T>(a, token, active ? column : 0), active, part);
    read_part(a, columns, norm + head.index * a.head_dim, active && head.kind != kValue, weight);
    const Target target =
        active ? target_of(a, token, place, head, sizeof(T), lane == 0) : Target{nullptr, nullptr};
    finish_head<T, R, VEC, PAIRS>(a, token, target, head.kind, lane, columns, part, weight,
                                  head.kind == kKey ? k_factor : q_factor, rotation);
  }
}

// True if every access of VEC values is inside one head and aligned.
template <typename T, int VEC>
bool fits(const RopeWriteKV& p) {
  constexpr int64_t kItem = sizeof(T);
  const KVCache& c = p.cache;
  const bool bytes = c.k_scale != nullptr;
  bool yes = p.head_dim % (2 * VEC) == 0 && p.rope_dim % (2 * VEC) == 0 && aligned(p.qkv, 16) &&
             aligned(p.q, 16) && cache_aligned(c, bytes ? 1 : kItem, bytes ? VEC : 16, VEC);
  for (int64_t stride : {p.qkv_token, p.q_token, p.q_head}) yes = yes && stride * kItem % 16 == 0;
  if (p.rope_dim > 0) {
    const int64_t item = p.rope_float ? 4 : kItem;
    yes = yes && aligned(p.cos, 16) && aligned(p.sin, 16) && p.cos_token * item % 16 == 0 &&
          p.sin_token * item % 16 == 0;
  }
  if (p.q_norm != nullptr) yes = yes && aligned(p.q_norm, 16) && aligned(p.k_norm, 16);
  return yes;
}

template <typename T, typename R, int VEC, int PAIRS>
void launch_kernel(RopeArgs& a, const Launch& launch) {
  a.lanes = lanes_for(ceil_div(a.head_dim, 2 * VEC));
  while (1 << a.lane_bits < a.lanes) ++a.lane_bits;
  if (a.norm_whole) {
    TPD_CHECK(launch.op, a.num_tokens < (int64_t{1} << 31), a.num_tokens, " tokens are too many");
    start_overlapped(launch, rope_whole_kernel<T, R, VEC, PAIRS>, a.num_tokens, kThreads, a);
    return;
  }
  const int64_t blocks = ceil_div(a.num_tokens * a.heads * a.lanes, kThreads);
  TPD_CHECK(launch.op, blocks * kThreads < (int64_t{1} << 31), a.num_tokens, " tokens x ", a.heads,
            " heads, too many threads for one launch");
  a.per_token = FastDiv(a.heads);
  start_overlapped(launch, rope_kernel<T, R, VEC, PAIRS>, blocks, kThreads, a);
}

template <typename T, typename R>
void launch_rope(const RopeWriteKV& p, RopeArgs& a, const Launch& launch) {
  constexpr int kVec = 16 / sizeof(T);
  constexpr int kMaxScalarDim = 1024, kScalarPairs = kMaxScalarDim / 64;
  if (fits<T, kVec>(p) && p.head_dim <= 64 * kVec) {
    return launch_kernel<T, R, kVec, 1>(a, launch);
  }
  TPD_CHECK(launch.op, p.head_dim <= kMaxScalarDim, "head_dim ", p.head_dim, " is above ",
            kMaxScalarDim);
  launch_kernel<T, R, 1, kScalarPairs>(a, launch);
}

void rope_write_kv(const Tensor& qkv, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& slots, const OptTensor& cos, const OptTensor& sin,
                   const OptTensor& q_norm, const OptTensor& k_norm, double eps, double norm_offset,
                   const std::optional<std::vector<int64_t>>& shard_heads, bool blocked,
                   const OptTensor& k_scale, const OptTensor& v_scale) {
  const char* op = "rope_write_kv";
  const RopeWriteKV p =
      make_rope_write_kv(op, qkv, q, k_cache, v_cache, slots, cos, sin, q_norm, k_norm, eps,
                         norm_offset, shard_heads, blocked, k_scale, v_scale);
  if (p.num_tokens == 0) return;
  const Launch launch(op, qkv);
  const int64_t kv_heads = p.cache.num_kv_heads;
  RopeArgs a{p.cache};
  a.qkv = p.qkv, a.q = p.q, a.slots = p.slots, a.cos = p.cos, a.sin = p.sin;
  a.q_norm = p.q_norm, a.k_norm = p.k_norm, a.num_tokens = p.num_tokens;
  a.qkv_token = p.qkv_token, a.q_token = p.q_token, a.q_head = p.q_head;
  a.cos_token = p.cos_token, a.sin_token = p.sin_token;
  a.num_heads = static_cast<int>(p.num_heads), a.head_dim = static_cast<int>(p.head_dim);
  a.rope_dim = static_cast<int>(p.rope_dim), a.group = static_cast<int>(p.num_heads / kv_heads);
  a.norm_whole = p.norm_whole, a.blocked = p.blocked, a.eps = p.eps, a.norm_offset = p.norm_offset;
  a.heads = static_cast<int>(p.num_heads + 2 * kv_heads);
  a.flag = error_flag(op, launch.device);
  for (size_t s = 0; s < p.shard_heads.size(); ++s) {
    a.start[s + 1] = a.start[s] + static_cast<int>(p.shard_heads[s]);
  }
  dispatch_float(op, p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.rope_float) {
      launch_rope<T, float>(p, a, launch);
    } else {
      launch_rope<T, T>(p, a, launch);
    }
  });
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("rope_write_kv", TORCH_BOX(&torch_pd::rope_write_kv));
}
