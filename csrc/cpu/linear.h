// Kernels of `linear`, one set per instruction set (isa.h).
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "isa.h"

namespace torch_pd {

using torch::headeronly::ScalarType;

// Weight rows of one work item.
constexpr int64_t kLinearBlock = 48;

// Rows of x that are multiplied together; `packed` holds them as float32 in the order in which the
// kernels read them. Strides in elements.
struct LinearRows {
  const void *x, *weight, *bias;  // bias null if not given
  void* out;
  float* packed;     // linear_packed_size(rows, in) floats, 64-byte aligned
  ScalarType dtype;  // float32, bfloat16 or float16
  int64_t rows, in, out_features, x_row, weight_row, out_row;
};

// Rows are packed in panels of at most two vectors of 16 lanes.
inline int64_t linear_packed_size(int64_t rows, int64_t in) { return (rows + 31) / 32 * 32 * in; }

// Packs x[:, k_begin:k_end]. Ranges are multiples of kLinearPackStep except for the last one's end.
constexpr int64_t kLinearPackStep = 64;
TPD_ISA(void, linear_pack, (const LinearRows& p, int64_t k_begin, int64_t k_end))

// Writes out[:, block * kLinearBlock : (block + 1) * kLinearBlock] for blocks begin .. end.
TPD_ISA(void, linear_blocks, (const LinearRows& p, int64_t begin, int64_t end))

}  // namespace torch_pd
