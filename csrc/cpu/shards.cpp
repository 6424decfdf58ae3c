// pack_shards, unpack_shards: columns of a matrix to and from the contiguous blocks of shards.
#include "../params/shards.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace torch_pd {

namespace {

void move_shards(const Shards& p, bool pack) {
  constexpr int64_t kGrainBytes = 128 * 1024;
  const int64_t row_bytes = std::max<int64_t>(1, p.width * p.item);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / row_bytes);
  torch::stable::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    int64_t before = 0;  // bytes of a row in the shards before
    for (const int64_t width : p.widths) {
      const int64_t bytes = width * p.item;
      char* block = static_cast<char*>(p.blocks) + p.rows * before;
      char* columns = static_cast<char*>(p.matrix) + before;
      for (int64_t row = begin; bytes > 0 && row < end; ++row) {
        char *there = block + row * bytes, *here = columns + row * p.row_stride * p.item;
        std::memcpy(pack ? there : here, pack ? here : there, bytes);
      }
      before += bytes;
    }
  });
}

void pack_shards(const Tensor& x, const Tensor& out, const std::vector<int64_t>& widths) {
  move_shards(make_pack_shards(x, out, widths), true);
}

void unpack_shards(const Tensor& x, const Tensor& out, const std::vector<int64_t>& widths) {
  move_shards(make_unpack_shards(x, out, widths), false);
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CPU, m) {
  m.impl("pack_shards", TORCH_BOX(&torch_pd::pack_shards));
  m.impl("unpack_shards", TORCH_BOX(&torch_pd::unpack_shards));
}
