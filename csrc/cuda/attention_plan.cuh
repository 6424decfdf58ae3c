// The list of work of the prefill kernels, made on the device: lengths never come to the host.
#pragma once

#include "attention_prefill.cuh"

namespace torch_pd {

constexpr int kPlanThreads = 1024;
constexpr int kPlanBuckets = 256;
constexpr int kPlanShared = kPlanThreads * static_cast<int>(sizeof(Sequence)) +
                            (kPlanBuckets + 1) * static_cast<int>(sizeof(int32_t));

// One block: a bucket sort of all tiles by the number of keys, most first, so that the last ones to
// start are short. Items are independent: their order within a bucket changes no result.
__global__ void __launch_bounds__(kPlanThreads)
    prefill_plan(const __grid_constant__ PrefillArgs p) {
  extern __shared__ __align__(128) char shared[];
  Sequence* list = reinterpret_cast<Sequence*>(shared);
  int32_t* counts = reinterpret_cast<int32_t*>(list + kPlanThreads);
  int32_t* top = counts + kPlanBuckets;
  const AttentionArgs& a = p.a;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  if (thread < kPlanBuckets) counts[thread] = 0;
  if (thread == 0) *top = 1;
  __syncthreads();
  int32_t most = 1;
  for (int s = thread; s < a.num_seqs; s += kPlanThreads) {
    const Sequence q = read_sequence(a, s, true);
    if (q.q_len > 0) most = max(most, q.len - q.begin);
  }
  atomicMax(top, most);
  for (int pass = 0; pass < 2; ++pass) {
    for (int base = 0; base < a.num_seqs; base += kPlanThreads) {
      __syncthreads();
      if (base + thread < a.num_seqs) list[thread] = read_sequence(a, base + thread, false);
      __syncthreads();
      for (int j = warp; j < min(kPlanThreads, a.num_seqs - base); j += kPlanThreads / 32) {
        const Sequence q = list[j];
        const int rows = q.q_len * a.group;
        for (int i = lane; i * p.tile_rows < rows; i += 32) {
          const int row0 = i * p.tile_rows;
          const KeyRange keys = key_range(a, q, row0, min(row0 + p.tile_rows, rows));
          const int64_t share =
              static_cast<int64_t>(max(0, keys.stop - keys.first)) * (kPlanBuckets - 1) / *top;
          const int at = atomicAdd(&counts[kPlanBuckets - 1 - static_cast<int>(share)], 1);
          // Query ranges that overlap (bad input) could be more than there is room for.
          if (pass == 1 && at < p.max_items) p.items[at] = {base + j, i, q};
        }
      }
    }
    __syncthreads();
    if (pass == 0 && thread == 0) {
      int32_t sum = 0;
      for (int b = 0; b < kPlanBuckets; ++b) {
        const int32_t count = counts[b];
        counts[b] = sum;
        sum += count;
      }
      *p.count = min(sum, p.max_items);
    }
  }
}

}  // namespace torch_pd
