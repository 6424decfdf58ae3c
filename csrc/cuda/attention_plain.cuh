// The plain kernel: float32, and every head_dim or alignment that the tensor-core kernels do not
// take. One warp per query row: a lane scores a key, then all lanes share the columns of V.
#pragma once

#include "attention.cuh"
#include "vec.cuh"

namespace torch_pd {

constexpr int kPlainWarps = 4;
constexpr int kPlainColumns = 16;  // per lane: V is at most 512 wide

template <typename T, typename KV>
__global__ void __launch_bounds__(kPlainWarps * 32)
    attention_plain(const __grid_constant__ AttentionArgs a, int k_dim, int v_dim) {
  constexpr bool kScaled = sizeof(KV) == 1;
  const int lane = threadIdx.x % 32;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kPlainWarps + threadIdx.x / 32;
  const int token = static_cast<int>(id / a.num_heads);
  const int head = static_cast<int>(id - static_cast<int64_t>(token) * a.num_heads);
  if (token >= a.num_tokens) return;
  int low = 0, high = a.num_seqs;  // the last sequence that starts at or before this token
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.query_start[middle] <= token ? low : high) = middle;
  }
  const bool reports = lane == 0 && head == 0;
  const Sequence q = read_sequence(a, low, reports);
  if (token < q.q_start || token >= q.q_start + q.q_len) return;
  const int kv_head = head / a.group;
  const int32_t last = q.position(token - q.q_start);
  const int32_t first = a.window > 0 ? max(0, last - a.window + 1) : 0;
  const T* query = static_cast<const T*>(a.q) + token * a.q_token + head * a.q_head;

  float m = -INFINITY, l = 0.0f, o[kPlainColumns];
#pragma unroll
  for (int i = 0; i < kPlainColumns; ++i) o[i] = 0.0f;
  for (int32_t base = first; base <= last; base += 32) {
    const int32_t key = base + lane;
    float score = -INFINITY, v_scale = 0.0f;
    const KV* v = nullptr;
    if (key <= last) {
      const int32_t entry = a.tables[low * a.table_stride + (key >> a.block_shift)];
      const int in_page = key & ((1 << a.block_shift) - 1);
      const bool first_of_page = in_page == 0 || key == base;
      const Page page = find_page<kScaled>(a, entry, head == 0 && first_of_page);
      float dot = 0.0f;
      if (page.valid) {
        const KV* k = reinterpret_cast<const KV*>(
            page.k + in_page * static_cast<int64_t>(a.k_token) + kv_head * a.k_head);
        v = reinterpret_cast<const KV*>(page.v + in_page * static_cast<int64_t>(a.v_token) +
                                        kv_head * a.v_head);
        for (int i = 0; i < k_dim; ++i) {
          dot += to_float(query[i]) * to_float(k[i]);
        }
        v_scale = 1.0f;
        if constexpr (kScaled) {
          dot *= page.k_scale[static_cast<int64_t>(in_page) * a.ks_token + kv_head];
          v_scale = page.v_scale[static_cast<int64_t>(in_page) * a.vs_token + kv_head];
        }
      }
      score = a.cap_log2 == 0.0f ? dot * a.scale_log2 : capped_logit(a, dot);
    }
    float top = score;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    top = fmaxf(top, m);
    const float alpha = exp2f(m - top), p = exp2f(score - top);
    m = top;
    l = l * alpha + p;
#pragma unroll
    for (int i = 0; i < kPlainColumns; ++i) o[i] *= alpha;
    for (int j = 0; j < min(32, last - base + 1); ++j) {
      const float weight = __shfl_sync(~0u, p * v_scale, j);
      const KV* row =
          reinterpret_cast<const KV*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(v), j));
      if (row == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kPlainColumns; ++i) {
        const int column = lane + 32 * i;
        if (column < v_dim) o[i] += weight * to_float(row[column]);
      }
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) l += __shfl_xor_sync(~0u, l, step);
  const Closed closed = close_row(a, m, l, head);
  T* out = static_cast<T*>(a.out) + token * a.out_token + head * a.out_head;
#pragma unroll
  for (int i = 0; i < kPlainColumns; ++i) {
    const int column = lane + 32 * i;
    if (column < v_dim) out[column] = static_cast<T>(o[i] * closed.factor);
  }
  if (a.lse != nullptr && lane == 0) a.lse[token * a.lse_token + head] = closed.lse;
}

}  // namespace torch_pd
