#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../params/linear.h"
#include "scratch.h"

namespace torch_pd {

namespace {

// Rows of x that stay in a core's L2 while the weights pass.
constexpr int64_t kPackedFloats = 320 * 1024;
constexpr int64_t kMaxRows = 512;

void linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, Tensor out) {
  const Linear p = make_linear("linear", x, weight, bias, out);
  if (p.rows == 0 || p.out_features == 0) return;
  const int64_t item = x.element_size();
  const int64_t most =
      std::clamp(p.in > 0 ? kPackedFloats / p.in / 32 * 32 : kMaxRows, int64_t{32}, kMaxRows);
  const int64_t parts = (p.rows + most - 1) / most;
  const int64_t part_rows = ((p.rows + parts - 1) / parts + 31) / 32 * 32;
  const int64_t blocks = (p.out_features + kLinearBlock - 1) / kLinearBlock;
  LinearRows r{nullptr,
               p.weight,
               p.bias,
               nullptr,
               scratch_floats(linear_packed_size(std::min(part_rows, p.rows), p.in)),
               p.dtype,
               0,
               p.in,
               p.out_features,
               p.x_row,
               p.weight_row,
               p.out_row};
  for (int64_t row = 0; row < p.rows; row += part_rows) {
    r.x = static_cast<const char*>(p.x) + row * p.x_row * item;
    r.out = static_cast<char*>(p.out) + row * p.out_row * item;
    r.rows = std::min(part_rows, p.rows - row);
    const int64_t steps = (p.in + kLinearPackStep - 1) / kLinearPackStep;
    // Starting threads costs about as much as packing this many floats.
    const int64_t grain = std::max<int64_t>(1, 65536 / (r.rows * kLinearPackStep));
    torch::stable::parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
      linear_pack_fn()(r, begin * kLinearPackStep, std::min(end * kLinearPackStep, r.in));
    });
    torch::stable::parallel_for(
        0, blocks, 1, [&](int64_t begin, int64_t end) { linear_blocks_fn()(r, begin, end); });
  }
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CPU, m) { m.impl("linear", TORCH_BOX(&torch_pd::linear)); }
