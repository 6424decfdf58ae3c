// rope_write_kv: q/k norm, rotation and KV write in one pass over the merged projection. A group of
// `lanes` threads takes one head of one token; a thread holds both halves of each pair it rotates,
// so only the norm crosses lanes.
#include <torch/csrc/stable/library.h>

#include "cache.cuh"

namespace torch_pd {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxShards = 64;  // params.h allows no more

struct RopeArgs {
  KVCache cache;
  const void* qkv;
  void* q;
  const int64_t* slots;
  const void *cos, *sin, *q_norm, *k_norm;
  int64_t num_tokens, qkv_token, q_token, q_head, cos_token, sin_token;
  int num_heads, head_dim, rope_dim, group;  // group: query heads per KV head
  bool norm_whole;
  float eps, norm_offset;
  int lanes;
  FastDiv heads;  // of a row of qkv: num_heads + 2 * num_kv_heads
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

// VEC consecutive values as float32, in accesses of at most 16 bytes.
template <int VEC, typename S>
__device__ __forceinline__ void read_floats(const S* from, float (&to)[VEC]) {
  constexpr int kStep = VEC * sizeof(S) > 16 ? 16 / sizeof(S) : VEC;
#pragma unroll
  for (int i = 0; i < VEC; i += kStep) {
    const Vec<S, kStep> in = load_vec<kStep>(from + i);
#pragma unroll
    for (int e = 0; e < kStep; ++e) to[i + e] = to_float(in.at[e]);
  }
}

// One head's share of one thread: PAIRS times two runs of VEC values, [p][0] and [p][1], which are
// rotated against each other or (behind rope_dim) just neighbours.
template <typename T, int VEC, int PAIRS>
struct HeadPart {
  Vec<T, VEC> raw[PAIRS][2];
  int column[PAIRS][2];  // head_dim: none
};

template <typename T, int VEC, int PAIRS>
__device__ __forceinline__ HeadPart<T, VEC, PAIRS> read_head(const RopeArgs& a, const T* head,
                                                             int lane, bool active) {
  HeadPart<T, VEC, PAIRS> part;
  const int half = a.rope_dim / 2;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = (lane + p * a.lanes) * VEC;
    const bool rotated = i < half;
    const int column[2] = {rotated ? i : 2 * i, rotated ? half + i : 2 * i + VEC};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      part.column[p][s] = active && column[s] < a.head_dim ? column[s] : a.head_dim;
      if (part.column[p][s] < a.head_dim) part.raw[p][s] = load_vec<VEC>(head + column[s]);
    }
  }
  return part;
}

template <typename T, int VEC, int PAIRS>
__device__ __forceinline__ float squares_of(const HeadPart<T, VEC, PAIRS>& part, int head_dim) {
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (part.column[p][s] >= head_dim) continue;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const float x = to_float(part.raw[p][s].at[e]);
        sum += x * x;
      }
    }
  }
  return sum;
}

// Where a head goes; `to` null: nowhere (padding, or a slot outside the pool).
struct Target {
  void* to;
  float* scale;  // of a float8 cache
};

__device__ __forceinline__ Target target_of(const RopeArgs& a, int64_t token, Head head, int item,
                                            bool reports) {
  if (head.kind == kQuery) {
    return {static_cast<char*>(a.q) + (token * a.q_token + head.index * a.q_head) * item, nullptr};
  }
  const KVCache& c = a.cache;
  const bool is_k = head.kind == kKey;
  const Slot slot =
      locate_slot(c, a.slots[token], a.flag, kRopeWriteKV, reports && is_k && head.index == 0);
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

// Norm, rotation and store of one head. All threads of a warp call it together; `factor` is 1 / rms
// if the norm spans all heads, else it is found here.
template <typename T, typename R, int VEC, int PAIRS>
__device__ __forceinline__ void finish_head(const RopeArgs& a, int64_t token, Head head, int lane,
                                            bool active, const HeadPart<T, VEC, PAIRS>& part,
                                            float factor) {
  const Target target =
      active ? target_of(a, token, head, sizeof(T), lane == 0) : Target{nullptr, nullptr};
  const bool is_value = head.kind == kValue;
  const T* norm = static_cast<const T*>(head.kind == kQuery ? a.q_norm : a.k_norm);
  if (a.q_norm != nullptr && !a.norm_whole) {
    const float squares = warp_sum(squares_of(part, a.head_dim), a.lanes);
    factor = rsqrtf(squares / static_cast<float>(a.head_dim) + a.eps);
  } else if (a.norm_whole) {
    norm += head.index * a.head_dim;
  }
  const bool normed = a.q_norm != nullptr && !is_value;
  const int half = a.rope_dim / 2;
  float x[PAIRS][2][VEC];
  float amax = 0.0f;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int column = part.column[p][s];
      if (column >= a.head_dim) continue;
#pragma unroll
      for (int e = 0; e < VEC; ++e) x[p][s][e] = to_float(part.raw[p][s].at[e]);
      if (!normed) continue;
      float weight[VEC];
      read_floats<VEC>(norm + column, weight);
#pragma unroll
      for (int e = 0; e < VEC; ++e) x[p][s][e] *= factor * (a.norm_offset + weight[e]);
    }
    const int column = part.column[p][0];
    if (!is_value && column < half) {
      const R* cos = static_cast<const R*>(a.cos) + token * a.cos_token + column;
      const R* sin = static_cast<const R*>(a.sin) + token * a.sin_token + column;
      float cos_a[VEC], sin_a[VEC], cos_b[VEC], sin_b[VEC];
      read_floats<VEC>(cos, cos_a);
      read_floats<VEC>(sin, sin_a);
      read_floats<VEC>(cos + half, cos_b);
      read_floats<VEC>(sin + half, sin_b);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const float first = x[p][0][e], second = x[p][1][e];
        x[p][0][e] = first * cos_a[e] - second * sin_a[e];
        x[p][1][e] = second * cos_b[e] + first * sin_b[e];
      }
    }
  }
  if (a.cache.k_scale != nullptr) {
#pragma unroll
    for (int i = 0; i < PAIRS * 2 * VEC; ++i) {
      const int p = i / (2 * VEC), s = i / VEC % 2;
      if (part.column[p][s] < a.head_dim) amax = fmaxf(amax, fabsf(x[p][s][i % VEC]));
    }
    amax = warp_max(amax, a.lanes);
  }
  if (target.to == nullptr) return;
  const float scale = fp8_scale(amax);
  if (target.scale != nullptr && lane == 0) *target.scale = scale;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int column = part.column[p][s];
      if (column >= a.head_dim) continue;
      if (target.scale != nullptr) {
        Vec<__nv_fp8_e4m3, VEC> out;
#pragma unroll
        for (int e = 0; e < VEC; ++e) out.at[e] = from_float<__nv_fp8_e4m3>(x[p][s][e] / scale);
        store_vec(static_cast<__nv_fp8_e4m3*>(target.to) + column, out);
      } else {
        Vec<T, VEC> out;
#pragma unroll
        for (int e = 0; e < VEC; ++e) out.at[e] = from_float<T>(x[p][s][e]);
        store_vec(static_cast<T*>(target.to) + column, out);
      }
    }
  }
}

// No norm, or one per head: groups of lanes over all heads of all tokens.
template <typename T, typename R, int VEC, int PAIRS>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ RopeArgs a) {
  const int lane = threadIdx.x % a.lanes;
  const uint32_t item =
      blockIdx.x * (kThreads / a.lanes) + static_cast<uint32_t>(threadIdx.x) / a.lanes;
  const int64_t token = a.heads.div(item);
  const bool active = token < a.num_tokens;
  const int column = static_cast<int>(item - static_cast<uint32_t>(token) * a.heads.divisor);
  const T* head = static_cast<const T*>(a.qkv) + token * a.qkv_token + int64_t{column} * a.head_dim;
  const auto part = read_head<T, VEC, PAIRS>(a, head, lane, active);
  finish_head<T, R, VEC, PAIRS>(a, token, head_of(a, column), lane, active, part, 1.0f);
}

// One norm over all q heads and one over all k heads: a block per token, which reads q and k again
// (from cache) once the norms are known.
template <typename T, typename R, int VEC, int PAIRS>
__global__ void __launch_bounds__(kThreads) rope_whole_kernel(const __grid_constant__ RopeArgs a) {
  __shared__ float partial[2][kThreads / 32];
  const int lane = threadIdx.x % a.lanes, group = threadIdx.x / a.lanes;
  const int groups = kThreads / a.lanes, heads = static_cast<int>(a.heads.divisor);
  const int64_t token = blockIdx.x;
  const T* row = static_cast<const T*>(a.qkv) + token * a.qkv_token;
  float q_squares = 0.0f, k_squares = 0.0f;
  for (int column = group; column < heads; column += groups) {
    const Kind kind = head_of(a, column).kind;
    if (kind == kValue) continue;
    const float sum = squares_of(
        read_head<T, VEC, PAIRS>(a, row + int64_t{column} * a.head_dim, lane, true), a.head_dim);
    (kind == kKey ? k_squares : q_squares) += sum;
  }
  const float q_count = static_cast<float>(a.num_heads * a.head_dim);
  const float k_count = static_cast<float>(a.cache.num_kv_heads * a.head_dim);
  const float q_factor = rsqrtf(block_sum(q_squares, partial[0]) / q_count + a.eps);
  const float k_factor = rsqrtf(block_sum(k_squares, partial[1]) / k_count + a.eps);
  for (int first = 0; first < heads; first += groups) {  // whole warps stay together
    const int column = first + group;
    const bool active = column < heads;
    const Head head = head_of(a, active ? column : 0);
    const auto part = read_head<T, VEC, PAIRS>(a, row + int64_t{column} * a.head_dim, lane, active);
    finish_head<T, R, VEC, PAIRS>(a, token, head, lane, active, part,
                                  head.kind == kKey ? k_factor : q_factor);
  }
}

// True if every access of VEC values is inside one head and aligned.
template <typename T, int VEC>
bool fits(const RopeWriteKV& p) {
  constexpr int64_t kItem = sizeof(T);
  const KVCache& c = p.cache;
  const bool fp8 = c.k_scale != nullptr;
  bool yes = p.head_dim % (2 * VEC) == 0 && p.rope_dim % (2 * VEC) == 0 && aligned(p.qkv, 16) &&
             aligned(p.q, 16) && cache_aligned(c, fp8 ? 1 : kItem, fp8 ? VEC : 16, VEC);
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
  if (a.norm_whole) {
    TPD_CHECK(launch.op, a.num_tokens < (int64_t{1} << 31), a.num_tokens, " tokens are too many");
    rope_whole_kernel<T, R, VEC, PAIRS>
        <<<static_cast<unsigned>(a.num_tokens), kThreads, 0, launch.stream>>>(a);
    return;
  }
  const int64_t per_block = kThreads / a.lanes;
  const int64_t blocks = ceil_div(a.num_tokens * a.heads.divisor, per_block);
  TPD_CHECK(launch.op, blocks * per_block < (int64_t{1} << 31), a.num_tokens, " tokens x ",
            a.heads.divisor, " heads, at most 2^31 - 1");
  rope_kernel<T, R, VEC, PAIRS><<<static_cast<unsigned>(blocks), kThreads, 0, launch.stream>>>(a);
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
                   const std::optional<std::vector<int64_t>>& shard_heads, const OptTensor& k_scale,
                   const OptTensor& v_scale) {
  const char* op = "rope_write_kv";
  const RopeWriteKV p = make_rope_write_kv(op, qkv, q, k_cache, v_cache, slots, cos, sin, q_norm,
                                           k_norm, eps, norm_offset, shard_heads, k_scale, v_scale);
  if (p.num_tokens == 0) return;
  const Launch launch(op, qkv);
  const int64_t kv_heads = p.cache.num_kv_heads;
  RopeArgs a{p.cache,
             p.qkv,
             p.q,
             p.slots,
             p.cos,
             p.sin,
             p.q_norm,
             p.k_norm,
             p.num_tokens,
             p.qkv_token,
             p.q_token,
             p.q_head,
             p.cos_token,
             p.sin_token,
             static_cast<int>(p.num_heads),
             static_cast<int>(p.head_dim),
             static_cast<int>(p.rope_dim),
             static_cast<int>(p.num_heads / kv_heads),
             p.norm_whole,
             p.eps,
             p.norm_offset,
             1,
             FastDiv(p.num_heads + 2 * kv_heads),
             error_flag(op, launch.device),
             {}};
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
  launch.check();
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("rope_write_kv", TORCH_BOX(&torch_pd::rope_write_kv));
}
