// Launches the general prefill kernel (attention_prefill.cuh).
#include <torch/csrc/stable/ops.h>

#include "attention_launch.h"
#include "attention_plan.cuh"
#include "attention_prefill.cuh"

namespace torch_pd {

Tensor plan_prefill(const AttentionCall& call, PrefillArgs& p) {
  const AttentionArgs& a = p.a;
  const int64_t rows = static_cast<int64_t>(a.num_tokens) * a.group;
  const int64_t items = (rows + p.tile_rows - 1) / p.tile_rows + a.num_seqs;
  TPD_CHECK(call.launch.op, items * a.num_kv_heads < (int64_t{1} << 31),
            "too many query tokens: ", a.num_tokens);
  p.max_items = static_cast<int32_t>(items);
  Workspace space;
  const int64_t list = space.add<PrefillItem>(items), count = space.add<int32_t>(1);
  Tensor memory = torch::stable::new_empty(call.like, {space.bytes()}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  p.items = reinterpret_cast<PrefillItem*>(base + list);
  p.count = reinterpret_cast<int32_t*>(base + count);
  prefill_plan<<<1, kPlanThreads, kPlanShared, call.launch.stream>>>(p);
  call.launch.check();
  return memory;
}

namespace {

template <typename Traits>
void prefill(const AttentionCall& call) {
  PrefillArgs p{call.args, Traits::kBlockRows};
  const Tensor memory = plan_prefill(call, p);
  allow_shared_once<&prefill_kernel<Traits>>(call.launch, Traits::kShared);
  prefill_kernel<Traits><<<static_cast<unsigned>(p.max_items * p.a.num_kv_heads),
                           Traits::kWarps * 32, Traits::kShared, call.launch.stream>>>(p);
  call.launch.check();
}

}  // namespace

void launch_prefill(AttentionCall call, int min_rows) {
  call.args.min_rows = min_rows;
  call.args.max_rows = INT32_MAX;
  dispatch_attention(call, [&](auto zero, auto width) {
    using T = decltype(zero);
    switch (call.stored) {
      case kAsQuery: return prefill<PrefillTraits<T, width.value, kAsQuery>>(call);
      case kFloat8: return prefill<PrefillTraits<T, width.value, kFloat8>>(call);
      case kInt8: return prefill<PrefillTraits<T, width.value, kInt8>>(call);
    }
  });
}

}  // namespace torch_pd
