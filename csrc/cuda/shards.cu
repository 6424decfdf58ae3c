// pack_shards, unpack_shards: columns of a matrix to and from the contiguous blocks of shards.
#include <torch/csrc/stable/library.h>

#include "../params/shards.h"
#include "overlap.cuh"
#include "vec.cuh"

namespace torch_pd {

namespace {

constexpr int kHeld = 4;

struct ShardArgs {
  char *matrix, *blocks;
  int64_t rows, row_stride;   // bytes
  int words;                  // of a row
  FastDiv chunks;             // blocks of threads per row
  int start[kMaxShards + 1];  // first word of a shard
};

// A block of threads moves kHeld words a thread of one row.
template <typename Word, bool PACK>
__global__ void __launch_bounds__(256) shards_kernel(const __grid_constant__ ShardArgs a) {
  const uint32_t row = a.chunks.div(blockIdx.x);
  const int chunk = static_cast<int>(blockIdx.x - row * a.chunks.divisor);
  const int threads = static_cast<int>(blockDim.x);
  const int first = chunk * threads * kHeld + static_cast<int>(threadIdx.x);
  Word* const matrix = reinterpret_cast<Word*>(a.matrix + row * a.row_stride);
  Word* const blocks = reinterpret_cast<Word*>(a.blocks);
  Word held[kHeld];
  Word* to[kHeld];
  after_previous();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int word = first + i * threads;
    to[i] = nullptr;
    if (word >= a.words) continue;
    int shard = 0;
    while (word >= a.start[shard + 1]) ++shard;
    const int64_t start = a.start[shard], width = a.start[shard + 1] - start;
    Word* const here = matrix + word;
    Word* const there = blocks + a.rows * start + row * width + word - start;
    held[i] = PACK ? *here : *there;
    to[i] = PACK ? there : here;
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (to[i] != nullptr) *to[i] = held[i];
  }
}

template <typename Word>
void start_move(const Shards& p, bool pack, const Launch& launch) {
  const int64_t per_word = static_cast<int64_t>(sizeof(Word)) / p.item;
  ShardArgs a{static_cast<char*>(p.matrix),
              static_cast<char*>(p.blocks),
              p.rows,
              p.row_stride * p.item,
              static_cast<int>(p.width / per_word),
              FastDiv(1),
              {}};
  for (size_t s = 0; s < p.widths.size(); ++s) {
    a.start[s + 1] = a.start[s] + static_cast<int>(p.widths[s] / per_word);
  }
  const int threads =
      static_cast<int>(std::min<int64_t>(256, ceil_div(ceil_div(a.words, kHeld), 32) * 32));
  const int64_t chunks = ceil_div(a.words, int64_t{threads} * kHeld);
  TPD_CHECK(launch.op, p.rows * chunks < (int64_t{1} << 31), p.rows, " rows x ", chunks,
            " blocks, at most 2^31 - 1");
  a.chunks = FastDiv(chunks);
  start_overlapped(launch, pack ? shards_kernel<Word, true> : shards_kernel<Word, false>,
                   p.rows * chunks, threads, a);
}

void move_shards(const char* op, const Shards& p, bool pack, const Tensor& like) {
  if (p.rows == 0 || p.width == 0) return;
  TPD_CHECK(op, p.width < (int64_t{1} << 30), p.width, " columns, at most 2^30 - 1");
  const Launch launch(op, like);
  bool wide = aligned(p.matrix, 16) && aligned(p.blocks, 16) && p.row_stride * p.item % 16 == 0;
  for (const int64_t width : p.widths) wide = wide && width * p.item % 16 == 0;
  if (wide) {
    start_move<uint4>(p, pack, launch);
  } else if (p.item == 4) {
    start_move<uint32_t>(p, pack, launch);
  } else {
    start_move<uint16_t>(p, pack, launch);
  }
}

void pack_shards(const Tensor& x, const Tensor& out, const std::vector<int64_t>& widths) {
  move_shards("pack_shards", make_pack_shards(x, out, widths), true, x);
}

void unpack_shards(const Tensor& x, const Tensor& out, const std::vector<int64_t>& widths) {
  move_shards("unpack_shards", make_unpack_shards(x, out, widths), false, x);
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("pack_shards", TORCH_BOX(&torch_pd::pack_shards));
  m.impl("unpack_shards", TORCH_BOX(&torch_pd::unpack_shards));
}
