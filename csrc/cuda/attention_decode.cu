// Launches decode attention (attention_decode.cuh).
#include <torch/csrc/stable/ops.h>

#include "attention_decode.cuh"
#include "attention_launch.h"

namespace torch_pd {

namespace {

template <typename T, int D, int ROWS>
void combine(const Launch& launch, const DecodeArgs& d, int max_tokens) {
  constexpr int kShared = kCombineWarps * ROWS * (D * 4 + 8);
  allow_shared_once<&decode_combine<T, D, ROWS>>(launch, kShared);
  const int rows = max_tokens * d.a.num_heads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((rows + ROWS - 1) / ROWS, d.a.num_seqs);
  config.blockDim = dim3(kCombineWarps * 32);
  config.dynamicSmemBytes = kShared;
  config.stream = launch.stream;
  // Its blocks may be resident before the decode kernel ends; they wait for its results.
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = launch.info.capability >= 90 ? 1 : 0;
  check_cuda(launch.op, cudaLaunchKernelEx(&config, decode_combine<T, D, ROWS>, d), "combine");
}

template <typename T, int D, bool FP8>
void decode(const AttentionCall& call, int max_rows) {
  using Traits = DecodeTraits<T, D, FP8>;
  const Launch& launch = call.launch;
  DecodeArgs d{call.args};
  const AttentionArgs& a = d.a;
  d.row_tiles = (max_rows + 15) / 16;
  const int64_t parts = static_cast<int64_t>(a.num_kv_heads) * d.row_tiles;
  const int64_t warps = static_cast<int64_t>(launch.info.num_sms) * Traits::kWarps;
  const int64_t most_tiles = static_cast<int64_t>(a.num_seqs) *
                             ((static_cast<int64_t>(a.max_pages) << a.block_shift) / kTileKeys);
  d.max_slices = static_cast<int32_t>(std::max<int64_t>(
      1, std::min(warps / parts, (most_tiles + kMinSliceTiles - 1) / kMinSliceTiles)));
  TPD_CHECK(launch.op, (a.num_seqs + 33) * 4 <= Traits::kShared && a.num_seqs < 65536,
            "too many sequences in one call: ", a.num_seqs);

  const int64_t rows = int64_t{2} * d.max_slices * parts * 16;
  Workspace space;
  const int64_t plan = space.add<int32_t>(a.num_seqs + 1), sums = space.add<float2>(rows),
                values = space.add<float>(rows * D);
  const Tensor memory = torch::stable::new_empty(call.like, {space.bytes()}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  d.plan = reinterpret_cast<int32_t*>(base + plan);
  d.sums = reinterpret_cast<float2*>(base + sums);
  d.values = reinterpret_cast<float*>(base + values);

  allow_shared_once<&decode_kernel<Traits>>(launch, Traits::kShared);
  const int64_t blocks = (d.max_slices * parts + Traits::kWarps - 1) / Traits::kWarps;
  decode_kernel<Traits>
      <<<static_cast<unsigned>(blocks), Traits::kWarps * 32, Traits::kShared, launch.stream>>>(d);
  launch.check();
  if (d.max_slices == 1) return;
  const int max_tokens = std::min(a.max_query_len, std::max(1, max_rows / a.group));
  // Few rows: a block each, so that many slices of one sequence are added up by many warps.
  if (static_cast<int64_t>(max_tokens) * a.num_heads * a.num_seqs <= 2048) {
    combine<T, D, 1>(launch, d, max_tokens);
  } else {
    combine<T, D, kCombineWarps>(launch, d, max_tokens);
  }
}

}  // namespace

void launch_decode(AttentionCall call, int max_rows) {
  call.args.min_rows = 0;
  call.args.max_rows = max_rows;
  dispatch_attention(call, [&](auto zero, auto width) {
    using T = decltype(zero);
    if (call.fp8) {
      decode<T, width.value, true>(call, max_rows);
    } else {
      decode<T, width.value, false>(call, max_rows);
    }
  });
}

}  // namespace torch_pd
