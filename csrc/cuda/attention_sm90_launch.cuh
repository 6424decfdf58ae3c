// Launches the wgmma prefill kernel (attention_sm90.cuh): what attention_sm90.cu and
// attention_sm90_bytes.cu, compiled beside each other, have in common.
#pragma once

#include "attention_launch.h"
#include "attention_sm90.cuh"

namespace torch_pd {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Through the runtime: this library does not link the driver's.
inline EncodeTiled encode_tiled(const char* op) {
  static std::atomic<void*> found{nullptr};
  void* function = found.load(std::memory_order_acquire);
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult result;
    check_cuda(op,
               cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    TPD_CHECK(op, result == cudaDriverEntryPointSuccess && function != nullptr,
              "the driver has no cuTensorMapEncodeTiled");
    found.store(function, std::memory_order_release);
  }
  return reinterpret_cast<EncodeTiled>(function);
}

// [pages, block_size, heads, D] of 16-bit elements, in boxes of 16 tokens x 64 columns of one head,
// swizzled; or of bytes, in boxes of 16 tokens of one head. Strides in bytes.
inline CUtensorMap make_map(const AttentionCall& call, const char* data, int64_t token,
                            int64_t head, int64_t page) {
  const AttentionArgs& a = call.args;
  const auto width = static_cast<cuuint64_t>(call.head_dim);
  const bool bytes = call.stored != kAsQuery;
  const cuuint64_t sizes[4] = {width, static_cast<cuuint64_t>(a.num_kv_heads),
                               cuuint64_t{1} << a.block_shift,
                               static_cast<cuuint64_t>(a.num_pages)};
  // A dimension of size 1 may have any stride in torch, not here.
  const cuuint64_t strides[3] = {
      static_cast<cuuint64_t>(a.num_kv_heads > 1 ? head : width * (bytes ? 1 : 2)),
      static_cast<cuuint64_t>(token), static_cast<cuuint64_t>(a.num_pages > 1 ? page : token)};
  const cuuint32_t box[4] = {bytes ? static_cast<cuuint32_t>(width) : 64, 1, kPageKeys, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode_tiled(call.launch.op)(
      &map,
      bytes                                ? CU_TENSOR_MAP_DATA_TYPE_UINT8
      : call.dtype == ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, const_cast<char*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      bytes ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TPD_CHECK(call.launch.op, result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with code ",
            static_cast<int>(result), " for strides ", head, ", ", token, ", ", page);
  return map;
}

template <typename T, int D, int STORED>
void launch_sm90(const AttentionCall& call) {
  using Traits = Sm90Traits<T, D, STORED>;
  Sm90Args args;
  args.p = {call.args, kSm90Rows};
  const AttentionArgs& a = call.args;
  args.k = make_map(call, a.k, a.k_token, a.k_head, a.k_page);
  args.v = make_map(call, a.v, a.v_token, a.v_head, a.v_page);
  const Tensor memory = plan_prefill(call, args.p);
  allow_shared_once<&prefill_sm90<Traits>>(call.launch, Traits::kShared);
  const int64_t items = static_cast<int64_t>(args.p.max_items) * a.num_kv_heads;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(call.launch.info.num_sms, items));
  prefill_sm90<Traits><<<blocks, Traits::kThreads, Traits::kShared, call.launch.stream>>>(args);
  call.launch.check();
}

}  // namespace torch_pd
