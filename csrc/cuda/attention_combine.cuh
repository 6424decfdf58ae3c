// Decode attention's second kernel: adds up the partial results of sequences that several slices
// worked on.
#pragma once

#include "attention_decode.cuh"

namespace torch_pd {

constexpr int kCombineWarps = 8;

// One row's result as a warp holds it: runs of kRun columns a lane.
template <int D>
struct RowSum {
  static constexpr int kPer = (D + 31) / 32;
  static constexpr int kRun = D % 128 == 0 ? 4 : 1;
  float m, l, o[kPer];

  __device__ __forceinline__ static int column(int i, int lane) {
    return (lane + i / kRun * 32) * kRun + i % kRun;
  }
  __device__ __forceinline__ void clear() {
    m = -INFINITY, l = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) o[i] = 0.0f;
  }
  __device__ __forceinline__ void read(const float* values, float2 sums, int lane) {
    m = sums.x, l = sums.y;
#pragma unroll
    for (int i = 0; i < kPer; i += kRun) {
      const int at = column(i, lane);
      if constexpr (kRun == 4) {
        const float4 x = *reinterpret_cast<const float4*>(values + at);
        o[i] = x.x, o[i + 1] = x.y, o[i + 2] = x.z, o[i + 3] = x.w;
      } else {
        o[i] = D % 32 == 0 || at < D ? values[at] : 0.0f;
      }
    }
  }
  __device__ __forceinline__ void add(const RowSum& other) {
    const float top = fmaxf(m, other.m), base = finite_base(top);
    const float mine = ptx::exp2_approx(m - base), theirs = ptx::exp2_approx(other.m - base);
    m = top, l = l * mine + other.l * theirs;
#pragma unroll
    for (int i = 0; i < kPer; ++i) o[i] = o[i] * mine + other.o[i] * theirs;
  }
  __device__ __forceinline__ void write(float* values, int lane) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int at = column(i, lane);
      if (D % 32 == 0 || at < D) values[at] = o[i];
    }
  }
  template <typename T>
  __device__ __forceinline__ void write(T* out, float factor, int lane) const {
#pragma unroll
    for (int i = 0; i < kPer; i += kRun == 4 ? 2 : 1) {
      const int at = column(i, lane);
      if constexpr (kRun == 4) {
        *reinterpret_cast<uint32_t*>(out + at) = ptx::pack2<T>(o[i] * factor, o[i + 1] * factor);
      } else if (D % 32 == 0 || at < D) {
        out[at] = static_cast<T>(o[i] * factor);
      }
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

// Finishes the sequences that more than one slice worked on. A column of the grid is a cut; all
// blocks of a sequence's cuts deal its rows out among them, and a block with few rows gives each
// several warps: so a long sequence, cut often, has many warps for its many partial results. Few
// enough registers that a block fits beside one of the decode kernel and is in place when that
// ends.
template <typename T, int D, int BATCH>
__global__ void __launch_bounds__(kCombineWarps * 32)
    decode_combine(const __grid_constant__ DecodeArgs d) {
  extern __shared__ __align__(128) char shared[];
  float* values = reinterpret_cast<float*>(shared);                      // [warps, D]
  float2* sums = reinterpret_cast<float2*>(values + kCombineWarps * D);  // [warps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::grid_dependency_wait();
  ptx::launch_dependents();
  const Cut cut = d.cuts[blockIdx.x + 1];
  if (cut.q_len == 0) return;
  const int rows = cut.q_len * d.a.num_heads;
  const int sharing = (cut.last - cut.first) * gridDim.y;  // blocks
  const int number = (blockIdx.x - cut.first) * gridDim.y + blockIdx.y;
  if (number >= rows) return;
  const int mine = (rows - number + sharing - 1) / sharing;  // rows number, number + sharing, ...
  int each = 1;                                              // warps a row
  while (each * 2 * mine <= kCombineWarps) each *= 2;
  if (each == 1) {
#pragma unroll 1
    for (int i = warp; i < mine; i += kCombineWarps) {
      const int row = number + i * sharing;
      const RowSum<D> sum = gather_row<D, BATCH>(d, cut, row, 0, 1, lane);
      write_row<T>(d.a, cut.q_start, row, sum, lane);
    }
    return;
  }
  const int row = number + warp / each * sharing, part = warp % each;
  RowSum<D> sum, other;
  if (row < rows) {
    sum = gather_row<D, BATCH>(d, cut, row, part, each, lane);
    if (part > 0) {
      sum.write(values + warp * D, lane);
      if (lane == 0) sums[warp] = make_float2(sum.m, sum.l);
    }
  }
  __syncthreads();
  if (row >= rows || part > 0) return;
#pragma unroll 1
  for (int w = warp + 1; w < warp + each; ++w) {
    other.read(values + w * D, sums[w], lane);
    sum.add(other);
  }
  write_row<T>(d.a, cut.q_start, row, sum, lane);
}

}  // namespace torch_pd
