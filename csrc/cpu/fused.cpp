// rope_write_kv, rms_norm, gated_act: checks and threads; the rows are in isa/fused.cpp.
#include "fused.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "values.h"

namespace torch_pd {

namespace {

// Rows that one thread should have at least: a decode step of a few rows stays on the caller's.
constexpr int64_t kGrainElements = 32768;
int64_t grain_of(int64_t width) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
}

void rope_write_kv(const Tensor& qkv, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& slots, const OptTensor& cos, const OptTensor& sin,
                   const OptTensor& q_norm, const OptTensor& k_norm, double eps, double norm_offset,
                   const std::optional<std::vector<int64_t>>& shard_heads, bool blocked,
                   const OptTensor& k_scale, const OptTensor& v_scale) {
  const RopeWriteKV p =
      make_rope_write_kv("rope_write_kv", qkv, q, k_cache, v_cache, slots, cos, sin, q_norm, k_norm,
                         eps, norm_offset, shard_heads, blocked, k_scale, v_scale);
  check_slots("rope_write_kv", p.slots, p.num_tokens, p.cache);
  torch::stable::parallel_for(0, p.num_tokens, grain_of(qkv.size(1)), [&](int64_t b, int64_t e) {
    std::vector<float> scratch(rope_scratch(p));
    rope_write_kv_rows_fn()(p, p.shard_heads.data(), static_cast<int64_t>(p.shard_heads.size()),
                            scratch.data(), b, e);
  });
}

void rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out, double eps,
              const OptTensor& residual, double scale, double offset) {
  const RmsNorm p = make_rms_norm("rms_norm", x, weight, out, eps, residual, scale, offset);
  torch::stable::parallel_for(0, p.num_tokens, grain_of(p.width),
                              [&](int64_t b, int64_t e) { rms_norm_rows_fn()(p, b, e); });
}

void gated_act(const Tensor& x, const Tensor& out, const std::string& activation,
               const std::optional<std::vector<int64_t>>& shard_widths) {
  const GatedAct p = make_gated_act("gated_act", x, out, activation, shard_widths);
  torch::stable::parallel_for(0, p.num_tokens, grain_of(2 * p.width), [&](int64_t b, int64_t e) {
    gated_act_rows_fn()(p, p.shard_widths.data(), static_cast<int64_t>(p.shard_widths.size()), b,
                        e);
  });
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CPU, m) {
  m.impl("rope_write_kv", TORCH_BOX(&torch_pd::rope_write_kv));
  m.impl("rms_norm", TORCH_BOX(&torch_pd::rms_norm));
  m.impl("gated_act", TORCH_BOX(&torch_pd::gated_act));
}
