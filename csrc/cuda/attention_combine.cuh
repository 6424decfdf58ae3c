// Decode attention's second kernel: adds up the partial results of sequences that several slices
// worked on.
#pragma once

#include "attention_decode.cuh"

namespace torch_pd {

constexpr int kCombineWarps = 8;

// One row's result as a warp holds it: columns lane, lane + 32, ...
template <int D>
struct RowSum {
  static constexpr int kPer = (D + 31) / 32;
  float m, l, o[kPer];

  __device__ __forceinline__ void clear() {
    m = -INFINITY, l = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) o[i] = 0.0f;
  }
  __device__ __forceinline__ void read(const float* values, float2 sums, int lane) {
    m = sums.x, l = sums.y;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      o[i] = D % 32 == 0 || lane + 32 * i < D ? values[lane + 32 * i] : 0.0f;
    }
  }
  __device__ __forceinline__ void add(const RowSum& other) {
    const float top = fmaxf(m, other.m), base = finite_base(top);
    const float mine = ptx::exp2_approx(m - base), theirs = ptx::exp2_approx(other.m - base);
    m = top, l = l * mine + other.l * theirs;
#pragma unroll
    for (int i = 0; i < kPer; ++i) o[i] = o[i] * mine + other.o[i] * theirs;
  }
  template <typename T>
  __device__ __forceinline__ void write(T* out, float factor, int lane) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (D % 32 == 0 || lane + 32 * i < D) out[lane + 32 * i] = static_cast<T>(o[i] * factor);
    }
  }
};

// Adds up the partial results of one row (query token, head) of a cut sequence: those of slice
// `from` after its first one and of every `step`-th after that. BATCH of them are read at once.
template <int D, int BATCH>
__device__ __forceinline__ RowSum<D> gather_row(const DecodeArgs& d, const Cut& cut, int row,
                                                int from, int step, int lane) {
  const AttentionArgs& a = d.a;
  const int token = row / a.num_heads, head = row - token * a.num_heads;
  const int kv_head = head / a.group;
  const int packed = token * a.group + head - kv_head * a.group;
  RowSum<D> sum, parts[BATCH];
  sum.clear();
#pragma unroll 1
  for (int32_t i = cut.first + from; i <= cut.last; i += BATCH * step) {
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int32_t slice = i + b * step;
      parts[b].clear();
      if (slice <= cut.last) {
        const int64_t at = partial_row(d, slice, slice == cut.first ? 1 : 0, kv_head, packed);
        parts[b].read(d.values + at * D, d.sums[at], lane);
      }
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) sum.add(parts[b]);
  }
  return sum;
}

template <typename T, int D>
__device__ __forceinline__ void write_row(const AttentionArgs& a, int32_t q_start, int row,
                                          const RowSum<D>& sum, int lane) {
  const int token = row / a.num_heads, head = row - token * a.num_heads;
  const Closed closed = close_row(a, sum.m, sum.l, head);
  sum.write(static_cast<T*>(a.out) + (q_start + token) * a.out_token + head * a.out_head,
            closed.factor, lane);
  if (a.lse != nullptr && lane == 0) a.lse[(q_start + token) * a.lse_token + head] = closed.lse;
}

// Finishes the sequences that more than one slice worked on: kCombineWarps rows of one for each
// block of a row of the grid, and a row of the grid for each cut. The blocks of a sequence's cuts
// share its rows, so that a long sequence has many blocks and none of its rows waits for another.
template <typename T, int D, int BATCH>
__global__ void __launch_bounds__(kCombineWarps * 32)
    decode_combine(const __grid_constant__ DecodeArgs d) {
  extern __shared__ __align__(128) char shared[];
  float* values = reinterpret_cast<float*>(shared);                      // [warps, D]
  float2* sums = reinterpret_cast<float2*>(values + kCombineWarps * D);  // [warps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::grid_dependency_wait();
  ptx::launch_dependents();
  const int slice = blockIdx.y + 1;
  const Cut cut = d.cuts[slice];
  const int row0 = blockIdx.x * kCombineWarps;
  const int rows = min(kCombineWarps, cut.q_len * d.a.num_heads - row0);
  const int sharing = min(kCombineWarps, cut.last - cut.first), number = slice - 1 - cut.first;
  if (number >= min(rows, sharing)) return;
  const int each = kCombineWarps / ((kCombineWarps + sharing - 1) / sharing);  // warps a row
  const int row = number + warp / each * sharing, part = warp % each;
  RowSum<D> sum, other;
  if (row < rows) {
    sum = gather_row<D, BATCH>(d, cut, row0 + row, part, each, lane);
    if (part > 0) {
      sum.write(values + warp * D, 1.0f, lane);
      if (lane == 0) sums[warp] = make_float2(sum.m, sum.l);
    }
  }
  if (each > 1) __syncthreads();
  if (row >= rows || part > 0) return;
#pragma unroll 1
  for (int w = warp + 1; w < warp + each; ++w) {
    other.read(values + w * D, sums[w], lane);
    sum.add(other);
  }
  write_row<T>(d.a, cut.q_start, row0 + row, sum, lane);
}

}  // namespace torch_pd
