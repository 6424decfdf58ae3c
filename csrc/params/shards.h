// Shards of a matrix: their sizes, and the arguments of pack_shards and unpack_shards.
#pragma once

#include <string>
#include <vector>

#include "../check.h"

namespace torch_pd {

constexpr int kMaxShards = 64;

// Parts of a whole: of heads, or of a matrix's width.
inline void check_shards(const char* op, const char* name, const std::vector<int64_t>& shards,
                         int64_t whole, const std::string& before, const char* after) {
  int64_t sum = 0;
  for (int64_t part : shards) {
    TPD_CHECK(op, part >= 0, name, " must not be negative, got ", part);
    sum += part;
  }
  TPD_CHECK(op, sum == whole && shards.size() <= kMaxShards, name, " has ", shards.size(),
            " shards that sum to ", sum, ", ", before, whole, after, " (at most ", kMaxShards,
            " shards)");
}

// Columns of one matrix and the same columns as contiguous blocks [rows, widths[s]] behind each
// other, one a shard.
struct Shards {
  void *matrix, *blocks;                  // the one that is read is const to its caller
  int64_t rows, width, row_stride, item;  // elements; bytes of one
  std::vector<int64_t> widths;            // of each block, in elements
};

inline Shards make_shards(const char* op, const char* name, const Tensor& matrix,
                          const char* blocks_name, const Tensor& blocks,
                          const std::vector<int64_t>& widths) {
  check_dim(op, name, matrix, 2);
  check_last_contiguous(op, name, matrix);
  check_dim(op, blocks_name, blocks, 1);
  check_contiguous(op, blocks_name, blocks);
  check_float(op, name, matrix);
  check_same_dtype(op, blocks_name, blocks, name, matrix);
  check_same_device(op, blocks_name, blocks, name, matrix);
  check_size(op, blocks_name, blocks, 0, matrix.size(0) * matrix.size(1));
  check_shards(op, "widths", widths, matrix.size(1), std::string(name) + " is ", " wide");
  return {matrix.data_ptr(),
          blocks.data_ptr(),
          matrix.size(0),
          matrix.size(1),
          matrix.stride(0),
          static_cast<int64_t>(matrix.element_size()),
          widths};
}

inline Shards make_pack_shards(const Tensor& x, const Tensor& out,
                               const std::vector<int64_t>& widths) {
  const Shards p = make_shards("pack_shards", "x", x, "out", out, widths);
  check_output("pack_shards", "out", out);
  return p;
}

inline Shards make_unpack_shards(const Tensor& x, const Tensor& out,
                                 const std::vector<int64_t>& widths) {
  const Shards p = make_shards("unpack_shards", "out", out, "x", x, widths);
  check_output("unpack_shards", "out", out);
  return p;
}

}  // namespace torch_pd
