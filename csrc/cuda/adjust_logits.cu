// adjust_logits: biases and penalties of the tokens that have some, in place.
#include <torch/csrc/stable/library.h>

#include "vec.cuh"

namespace torch_pd {

namespace {

struct AdjustArgs {
  void* logits;
  const int32_t* entries;  // [E, 3]: row (-1: none), token, count
  const float* bias;       // [E]
  const float* penalties;  // [n, 3]: repetition, frequency, presence
  int64_t count, rows, vocab, stride;
  int32_t* flag;
};

template <typename T>
__global__ void adjust_kernel(const AdjustArgs a) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= a.count) return;
  const int32_t row = a.entries[3 * i], token = a.entries[3 * i + 1], times = a.entries[3 * i + 2];
  if (row == -1) return;
  const bool bad_row = row < 0 || row >= a.rows;
  if (bad_row || token < 0 || token >= a.vocab) {
    raise_flag(a.flag, kAdjustLogits, kBadToken, bad_row ? row : token);
    return;
  }
  T* at = static_cast<T*>(a.logits) + row * a.stride + token;
  float x = to_float(*at) + a.bias[i];
  if (times >= 0) {
    const float* penalty = a.penalties + 3 * int64_t{row};
    x = x > 0.0f ? x / penalty[0] : x * penalty[0];
    x = x - penalty[1] * static_cast<float>(times) - (times > 0 ? penalty[2] : 0.0f);
  }
  *at = from_float<T>(x);
}

void adjust_logits(const Tensor& logits, const Tensor& entries, const Tensor& bias,
                   const Tensor& penalties) {
  const char* op = "adjust_logits";
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  check_last_contiguous(op, "logits", logits);
  check_output(op, "logits", logits);
  check_index(op, "entries", entries, ScalarType::Int, 2, "logits", logits);
  check_contiguous(op, "entries", entries);
  check_size(op, "entries", entries, 1, 3);
  check_index(op, "bias", bias, ScalarType::Float, 1, "logits", logits);
  check_size(op, "bias", bias, 0, entries.size(0));
  check_index(op, "penalties", penalties, ScalarType::Float, 2, "logits", logits);
  check_contiguous(op, "penalties", penalties);
  check_size(op, "penalties", penalties, 0, logits.size(0));
  check_size(op, "penalties", penalties, 1, 3);
  const int64_t count = entries.size(0);
  if (count == 0) return;
  const Launch launch(op, logits);
  const AdjustArgs a{logits.data_ptr(),
                     static_cast<const int32_t*>(entries.data_ptr()),
                     static_cast<const float*>(bias.data_ptr()),
                     static_cast<const float*>(penalties.data_ptr()),
                     count,
                     logits.size(0),
                     logits.size(1),
                     logits.stride(0),
                     error_flag(op, launch.device)};
  constexpr int kBlock = 256;
  TPD_CHECK(op, ceil_div(count, kBlock) < (int64_t{1} << 31), count, " entries are too many");
  const auto blocks = static_cast<unsigned>(ceil_div(count, kBlock));
  dispatch_float(op, logits.scalar_type(), [&](auto* type) {
    adjust_kernel<std::remove_pointer_t<decltype(type)>><<<blocks, kBlock, 0, launch.stream>>>(a);
  });
  launch.check();
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("adjust_logits", TORCH_BOX(&torch_pd::adjust_logits));
}
