// Arguments of linear.
#pragma once

#include "../check.h"

namespace torch_pd {

struct Linear {
  const void *x, *weight, *bias;  // bias null if not given
  void* out;
  ScalarType dtype;
  int64_t rows, in, out_features, x_row, weight_row, out_row;
};

inline Linear make_linear(const char* op, const Tensor& x, const Tensor& weight,
                          const OptTensor& bias, const Tensor& out) {
  check_dim(op, "x", x, 2);
  check_dim(op, "weight", weight, 2);
  check_dim(op, "out", out, 2);
  check_float(op, "x", x);
  check_size(op, "weight", weight, 1, x.size(1));
  check_size(op, "out", out, 0, x.size(0));
  check_size(op, "out", out, 1, weight.size(0));
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_same_dtype(op, name, t, "x", x);
    check_same_device(op, name, t, "x", x);
    check_last_contiguous(op, name, t);
  };
  check_like("weight", weight);
  check_like("out", out);
  check_last_contiguous(op, "x", x);
  check_output(op, "out", out);
  if (bias) {
    check_dim(op, "bias", *bias, 1);
    check_size(op, "bias", *bias, 0, weight.size(0));
    check_like("bias", *bias);
  }
  return {x.data_ptr(),     weight.data_ptr(), bias ? bias->data_ptr() : nullptr,
          out.data_ptr(),   x.scalar_type(),   x.size(0),
          x.size(1),        weight.size(0),    x.stride(0),
          weight.stride(0), out.stride(0)};
}

}  // namespace torch_pd
