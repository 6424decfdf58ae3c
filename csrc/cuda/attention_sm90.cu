// Launches the wgmma prefill kernel (attention_sm90.cuh).
#include "attention_sm90_launch.cuh"

namespace torch_pd {

namespace {

template <typename T>
void dispatch_width(const AttentionCall& call) {
  switch (call.head_dim) {
    case 64: return launch_sm90<T, 64, kAsQuery>(call);
    case 128: return launch_sm90<T, 128, kAsQuery>(call);
    default: return launch_sm90<T, 256, kAsQuery>(call);
  }
}

}  // namespace

bool fits_sm90(const AttentionCall& call) {
#ifdef TORCH_PD_SM90A
  const AttentionArgs& a = call.args;
  bool fits = call.launch.info.capability == 90 && a.num_places <= 1 && a.scale_log2 > 0.0f &&
              (call.stored == kAsQuery || call.dtype == ScalarType::BFloat16) &&
              (call.head_dim == 64 || call.head_dim == 128 || call.head_dim == 256);
  // The copy engine's strides are unsigned and below 2^40.
  for (int64_t stride : {a.k_page, a.v_page, int64_t{a.k_token}, int64_t{a.v_token},
                         int64_t{a.k_head}, int64_t{a.v_head}}) {
    fits = fits && stride >= 0 && stride < int64_t{1} << 40;
  }
  for (int64_t n : {reinterpret_cast<int64_t>(a.q), reinterpret_cast<int64_t>(a.out), a.q_token * 2,
                    a.q_head * 2, a.out_token * 2, a.out_head * 2}) {
    fits = fits && n % 16 == 0;
  }
  return fits;
#else
  return false;
#endif
}

void launch_prefill_sm90(AttentionCall call, int min_rows) {
  call.args.min_rows = min_rows;
  call.args.max_rows = INT32_MAX;
  if (call.stored != kAsQuery) {
    launch_prefill_sm90_bytes(call);
  } else if (call.dtype == ScalarType::BFloat16) {
    dispatch_width<__nv_bfloat16>(call);
  } else {
    dispatch_width<__half>(call);
  }
}

}  // namespace torch_pd
