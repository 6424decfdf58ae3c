// Arguments of rms_norm and gated_act.
#pragma once

#include <string>
#include <vector>

#include "shards.h"

namespace torch_pd {

struct RmsNorm {
  const void *x, *weight;
  void *out, *residual;  // residual null if not given
  ScalarType dtype;
  int64_t num_tokens, width, x_token, out_token, residual_token;
  float eps, scale, offset;
};

inline RmsNorm make_rms_norm(const char* op, const Tensor& x, const Tensor& weight,
                             const Tensor& out, double eps, const OptTensor& residual, double scale,
                             double offset) {
  check_dim(op, "x", x, 2);
  check_float(op, "x", x);
  check_last_contiguous(op, "x", x);
  check_dim(op, "weight", weight, 1);
  check_size(op, "weight", weight, 0, x.size(1));
  check_same_dtype(op, "weight", weight, "x", x);
  check_same_device(op, "weight", weight, "x", x);
  check_contiguous(op, "weight", weight);
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_dim(op, name, t, 2);
    check_size(op, name, t, 0, x.size(0));
    check_size(op, name, t, 1, x.size(1));
    check_same_dtype(op, name, t, "x", x);
    check_same_device(op, name, t, "x", x);
    check_last_contiguous(op, name, t);
    check_output(op, name, t);
  };
  check_like("out", out);
  if (residual) check_like("residual", *residual);
  TPD_CHECK(op, residual || scale == 1.0, "scale ", scale, " needs a residual");
  return {x.data_ptr(),
          weight.data_ptr(),
          out.data_ptr(),
          residual ? residual->data_ptr() : nullptr,
          x.scalar_type(),
          x.size(0),
          x.size(1),
          x.stride(0),
          out.stride(0),
          residual ? residual->stride(0) : 0,
          static_cast<float>(eps),
          static_cast<float>(scale),
          static_cast<float>(offset)};
}

enum class Activation { kSilu, kGelu, kGeluTanh };

struct GatedAct {
  const void* x;
  void* out;
  ScalarType dtype;
  Activation activation;
  int64_t num_tokens, width, x_token, out_token;
  std::vector<int64_t> shard_widths;  // sums to width
};

inline GatedAct make_gated_act(const char* op, const Tensor& x, const Tensor& out,
                               const std::string& activation,
                               const std::optional<std::vector<int64_t>>& shard_widths) {
  check_dim(op, "x", x, 2);
  check_float(op, "x", x);
  check_last_contiguous(op, "x", x);
  TPD_CHECK(op, x.size(1) % 2 == 0, "x must be an even number of columns, got ", x.size(1));
  check_dim(op, "out", out, 2);
  check_size(op, "out", out, 0, x.size(0));
  check_size(op, "out", out, 1, x.size(1) / 2);
  check_same_dtype(op, "out", out, "x", x);
  check_same_device(op, "out", out, "x", x);
  check_last_contiguous(op, "out", out);
  check_output(op, "out", out);
  GatedAct p{x.data_ptr(), out.data_ptr(), x.scalar_type(), Activation::kSilu,
             x.size(0),    out.size(1),    x.stride(0),     out.stride(0)};
  if (activation == "gelu") {
    p.activation = Activation::kGelu;
  } else if (activation == "gelu_tanh") {
    p.activation = Activation::kGeluTanh;
  } else {
    TPD_CHECK(op, activation == "silu", "activation must be silu, gelu or gelu_tanh, got ",
              activation);
  }
  p.shard_widths = shard_widths.value_or(std::vector<int64_t>{p.width});
  check_shards(op, "shard_widths", p.shard_widths, p.width, "out is ", " wide");
  return p;
}

}  // namespace torch_pd
