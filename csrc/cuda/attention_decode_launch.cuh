// Launches decode attention (attention_decode.cuh, attention_combine.cuh): what attention_decode.cu
// and attention_decode_tall.cu, compiled beside each other, have in common.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "attention_combine.cuh"
#include "attention_launch.h"

namespace torch_pd {

// Launches so that blocks may be in place before the kernel before it ends: both kernels wait for
// its results first of all.
template <typename Kernel>
void launch_early(const Launch& launch, Kernel* kernel, dim3 blocks, int threads, int shared,
                  const DecodeArgs& d) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = launch.stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = launch.info.capability >= 90 ? 1 : 0;
  check_cuda(launch.op, cudaLaunchKernelEx(&config, kernel, d), "kernel launch");
}

template <typename T, int D>
void combine(const Launch& launch, const DecodeArgs& d, int max_tokens) {
  constexpr int kShared = kCombineWarps * (D * 4 + 8), kBatch = D > 128 ? 2 : 3;
  prefer_shared_once<&decode_combine<T, D, kBatch>>(launch);
  // About one batch of partial results a warp.
  const int64_t rows = static_cast<int64_t>(max_tokens) * d.a.num_heads, cuts = d.max_slices - 1;
  const int64_t all = rows * (std::min<int64_t>(d.a.num_seqs, cuts) + cuts);
  const int64_t each = int64_t{kBatch} * kCombineWarps * cuts;
  const auto blocks = static_cast<unsigned>((all + each - 1) / each);
  launch_early(launch, decode_combine<T, D, kBatch>, dim3(d.max_slices - 1, blocks),
               kCombineWarps * 32, kShared, d);
}

template <typename T, int D, int STORED, int ROWS>
void decode(const AttentionCall& call, int max_rows) {
  using Traits = DecodeTraits<T, D, STORED, ROWS>;
  const Launch& launch = call.launch;
  DecodeArgs d{call.args};
  const AttentionArgs& a = d.a;
  d.row_tiles = (max_rows + ROWS - 1) / ROWS;
  d.padded_rows = d.row_tiles * ROWS;
  const int64_t parts = static_cast<int64_t>(a.num_kv_heads) * d.row_tiles;
  const int64_t room = static_cast<int64_t>(launch.info.num_sms) * Traits::kBlocks;
  const int64_t most_keys = static_cast<int64_t>(a.max_pages) << a.block_shift;
  const int64_t most_steps = a.num_seqs * ((most_keys + Traits::kKeys - 1) / Traits::kKeys + 1);
  // Batches are often multiples of eight sequences of like lengths, which so many slices cut least.
  const auto most = static_cast<int32_t>(std::max<int64_t>(1, room / parts));
  d.max_slices = Deal(most_steps, most >= 32 ? most / 8 * 8 : most, Traits::kLeastSteps).slices;
  TPD_CHECK(launch.op, (a.num_seqs + 33) * 4 <= Traits::kShared,
            "too many sequences in one call: ", a.num_seqs);

  const int64_t blocks = d.max_slices * parts, rows = 2 * blocks * ROWS;
  Workspace space;
  const int64_t cuts = space.add<Cut>(d.max_slices), sums = space.add<float2>(rows),
                values = space.add<float>(rows * D),
                parked = space.add<float>(blocks * Traits::kWarps * ROWS * Traits::kSumPitch);
  const Tensor memory = torch::stable::new_empty(call.like, {space.bytes()}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  d.cuts = reinterpret_cast<Cut*>(base + cuts);
  d.sums = reinterpret_cast<float2*>(base + sums);
  d.values = reinterpret_cast<float*>(base + values);
  d.parked = reinterpret_cast<float*>(base + parked);

  allow_shared_once<&decode_kernel<Traits>>(launch, Traits::kShared);
  launch_early(launch, decode_kernel<Traits>, dim3(static_cast<unsigned>(blocks)),
               Traits::kWarps * 32, Traits::kShared, d);
  if (d.max_slices == 1) return;
  const int max_tokens = std::min(a.max_query_len, std::max(1, max_rows / a.group));
  combine<T, D>(launch, d, max_tokens);
}

template <int ROWS>
void decode_rows(const AttentionCall& call, int max_rows) {
  dispatch_attention(call, [&](auto zero, auto width) {
    using T = decltype(zero);
    switch (call.stored) {
      case kAsQuery: return decode<T, width.value, kAsQuery, ROWS>(call, max_rows);
      case kFloat8: return decode<T, width.value, kFloat8, ROWS>(call, max_rows);
      case kInt8: return decode<T, width.value, kInt8, ROWS>(call, max_rows);
    }
  });
}

}  // namespace torch_pd
