// The wgmma prefill kernel over pages of bytes: bfloat16 queries. (In float16, weights times the
// scales of values could leave its range.)
#include "attention_sm90_launch.cuh"

namespace torch_pd {

namespace {

template <int D>
void dispatch_stored(const AttentionCall& call) {
  if (call.stored == kInt8) {
    launch_sm90<__nv_bfloat16, D, kInt8>(call);
  } else {
    launch_sm90<__nv_bfloat16, D, kFloat8>(call);
  }
}

}  // namespace

void launch_prefill_sm90_bytes(const AttentionCall& call) {
  switch (call.head_dim) {
    case 64: return dispatch_stored<64>(call);
    case 128: return dispatch_stored<128>(call);
    default: return dispatch_stored<256>(call);
  }
}

}  // namespace torch_pd
