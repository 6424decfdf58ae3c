// gather_kv, copy_pages: gathering from pages and moving them whole, in one pass over memory.
#include <torch/csrc/stable/library.h>

#include "../params/paged_kv.h"
#include "cache.cuh"
#include "overlap.cuh"

namespace torch_pd {

namespace {

constexpr int kThreads = 128;
constexpr int kMostBlocks = 12;  // of gather_kernel on a multiprocessor

// Largest s in [0, num_seqs) with start[s] <= token; each round a warp probes 32 places. Any values
// of `start` end in that range. PAST_L1: read from the L2 cache.
template <bool PAST_L1 = false>
__device__ __forceinline__ int find_sequence(const int32_t* start, int num_seqs, int64_t token) {
  int low = 0, high = num_seqs;
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int probe = low + (static_cast<int>(threadIdx.x % 32) + 1) * step;
    const bool below = probe < high && (PAST_L1 ? __ldcg(start + probe) : start[probe]) <= token;
    low += step * __popc(__ballot_sync(0xffffffffu, below));
    high = min(high, low + step);
  }
  return low;
}

// K or V: of the pool, and the contiguous output. Strides in elements.
template <int VEC>
struct Side {
  Heads<VEC> heads;
  const void* from;
  int64_t page, token, head;
  const float* scales;  // of a cache of bytes
  int64_t scale_page, scale_token;
  void* to;
  int64_t to_token, to_head;
};

template <int VEC>
struct GatherArgs {
  Side<VEC> sides[2];
  Tables tables;
  Places places;
  const int32_t* kv_start;
  int64_t num_tokens, num_pages;
  int block_shift;
  int early_blocks;  // that may be in place before the kernels before have ended
  int32_t* flag;
};

// Brings what the block's first warp will find for its tokens to the L2 cache, while the kernels
// before may still be writing the tables: whatever they hold, only lines of this pool are fetched.
// Its loads pass by the L1 cache, which would keep what is not final yet; so many warps at the few
// lines of starts and lengths would queue in one place of L2, hence one warp and the first blocks.
template <typename Src, int VEC>
__device__ __forceinline__ void prefetch_tokens(const GatherArgs<VEC>& a, int first, int count) {
  const int num_seqs = static_cast<int>(a.tables.num_seqs);
  if (num_seqs == 0) return;
  const int seq = find_sequence<true>(a.kv_start, num_seqs, first);
  const int start = __ldcg(a.kv_start + seq);
  for (int token = first; token < first + count && token < a.num_tokens; ++token) {
    const int64_t position = int64_t{token} - start, row = position >> a.block_shift;
    if (position < 0 || row >= a.tables.max_pages) continue;
    const int32_t page = __ldcg(a.tables.block_tables + seq * a.tables.table_stride + row);
    if (page < 0 || page >= a.num_pages) continue;  // or in another place
    const int offset = static_cast<int>(position) & ((1 << a.block_shift) - 1);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const Side<VEC>& side = a.sides[s];
      prefetch_heads(side.heads,
                     static_cast<const Src*>(side.from) + page * side.page + offset * side.token,
                     side.head);
      if (side.scales != nullptr) {
        ptx::prefetch_l2(side.scales + page * side.scale_page + offset * side.scale_token);
      }
    }
  }
}

// The scales of what read_heads got, from those [Hkv] of a token.
template <int VEC>
__device__ __forceinline__ void read_scales(const Heads<VEC>& heads, const float* scales, int first,
                                            float (&held)[kHeld]) {
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int i = first + 32 * u;
    if (i < heads.count) held[u] = scales[heads.head(i)];
  }
}

// Writes what read_heads got, times its scales if Src is of bytes.
template <typename Src, typename Dst, int VEC>
__device__ __forceinline__ void put_heads(const Heads<VEC>& heads, Dst* to, int64_t stride,
                                          int first, const Vec<Src, VEC> (&held)[kHeld],
                                          const float (&scale)[kHeld]) {
  const int64_t gap = heads.gap(stride);
  to += first * VEC;
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int i = first + 32 * u;
    if (i >= heads.count) continue;
    Dst* const there = to + heads.head(i) * gap + 32 * u * VEC;
    if constexpr (std::is_same_v<Src, Dst>) {
      store_vec(there, held[u]);
    } else {
      float x[VEC];
      widen(held[u], x);
#pragma unroll
      for (int e = 0; e < VEC; ++e) x[e] *= scale[u];
      store_vec(there, narrow<Dst, VEC>(x));
    }
  }
}

// A warp takes K or V of one token: few registers, so that many find their token while others copy.
// Src is a byte (converted to Dst) or one word type on both sides.
template <typename Src, typename Dst, int VEC>
__global__ void __launch_bounds__(kThreads, std::is_same_v<Src, Dst> ? kMostBlocks : 10)
    gather_kernel(const __grid_constant__ GatherArgs<VEC> a) {
  const int lane = threadIdx.x % 32, num_seqs = static_cast<int>(a.tables.num_seqs);
  const int warp = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
  const int token = warp / 2, which = warp % 2;
  if (threadIdx.x < 32 && blockIdx.x < a.early_blocks) {
    prefetch_tokens<Src>(a, token, kThreads / 64);
  }
  after_previous();
  if (token >= a.num_tokens) return;
  const bool reports = lane == 0 && which == 0;
  const int seq = find_sequence(a.kv_start, num_seqs, token);
  const int length = num_seqs > 0 ? a.tables.seq_lens[seq] : 0;
  const int64_t position = num_seqs > 0 ? int64_t{token} - a.kv_start[seq] : -1;
  const int64_t row = position >> a.block_shift;
  const bool in_table = position >= 0 && row < a.tables.max_pages;
  // Read before the length has come.
  const int32_t entry = in_table ? a.tables.block_tables[seq * a.tables.table_stride + row] : 0;
  if (!in_table || position >= length) {
    if (reports) raise_flag(a.flag, kGatherKV, kBadLength, length);
    return;
  }
  const int place = static_cast<uint32_t>(entry) >> kPlaceShift;
  const int page = entry & kPageIndexMask;
  int64_t pages = 0, moved = 0;  // pool size, its distance in bytes from this one
  if (place == 0) {
    pages = a.num_pages;
  } else if (place < a.places.count) {
    pages = a.places.rows[2 * place + 1];
    moved = a.places.rows[2 * place] - a.places.rows[0];
  }
  if (page >= pages) {
    if (reports) {
      raise_flag(a.flag, kGatherKV, place > 0 && place >= a.places.count ? kBadPlace : kBadPage,
                 entry);
    }
    return;
  }
  const int offset = static_cast<int>(position) & ((1 << a.block_shift) - 1);
  const auto at = [&](const void* base, int64_t elements, int64_t item) {
    return static_cast<const char*>(base) + moved + elements * item;
  };
  const Side<VEC>& side = a.sides[which];
  const auto* from = reinterpret_cast<const Src*>(
      at(side.from, page * side.page + offset * side.token, sizeof(Src)));
  const float* scales = nullptr;
  if constexpr (!std::is_same_v<Src, Dst>) {
    scales = reinterpret_cast<const float*>(
        at(side.scales, page * side.scale_page + offset * side.scale_token, 4));
  }
  Dst* to = static_cast<Dst*>(side.to) + int64_t{token} * side.to_token;
  for (int first = lane; first < side.heads.count; first += 32 * kHeld) {
    Vec<Src, VEC> held[kHeld];
    float scale[kHeld];
    read_heads(side.heads, from, side.head, first, held);
    if constexpr (!std::is_same_v<Src, Dst>) read_scales(side.heads, scales, first, scale);
    put_heads(side.heads, to, side.to_head, first, held, scale);
  }
}

constexpr int kCopyThreads = 256, kCopyUnroll = 8;

// One chunk of one page per block.
template <typename Word>
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(const CopyPages p, const FastDiv chunks, int32_t* const flag) {
  after_previous();
  const int64_t move = chunks.div(blockIdx.x);
  const int64_t chunk = blockIdx.x - move * chunks.divisor;
  const int64_t src = p.moves[2 * move], dst = p.moves[2 * move + 1];
  const bool bad_src = src < 0 || src >= p.src_pages, bad_dst = dst < 0 || dst >= p.dst_pages;
  if (bad_src || bad_dst) {
    if (chunk == 0 && threadIdx.x == 0) {
      raise_flag(flag, kCopyPages, kBadMove, bad_src ? src : dst);
    }
    return;
  }
  const Word* from = reinterpret_cast<const Word*>(p.src + src * p.src_stride);
  Word* to = reinterpret_cast<Word*>(p.dst + dst * p.dst_stride);
  const int64_t words = p.page_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t first = chunk * (kCopyThreads * kCopyUnroll) + threadIdx.x;
  Word held[kCopyUnroll];
#pragma unroll
  for (int u = 0; u < kCopyUnroll; ++u) {
    if (first + u * kCopyThreads < words) held[u] = from[first + u * kCopyThreads];
  }
#pragma unroll
  for (int u = 0; u < kCopyUnroll; ++u) {
    if (first + u * kCopyThreads < words) to[first + u * kCopyThreads] = held[u];
  }
}

void gather_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
               const Tensor& seq_lens, const Tensor& kv_start, const Tensor& k, const Tensor& v,
               const OptTensor& k_scale, const OptTensor& v_scale, const OptTensor& places) {
  const char* op = "gather_kv";
  const GatherKV p = make_gather_kv(op, k_cache, v_cache, block_tables, seq_lens, kv_start, k, v,
                                    k_scale, v_scale, places);
  if (p.num_tokens == 0) return;
  const Launch launch(op, k_cache);
  const Rows rows{p.k_token, p.k_head, p.v_token, p.v_head};
  const auto start = [&](auto* kernel, auto vec, const KVCache& c, const Rows& to) {
    using Part = Heads<vec.value>;
    const GatherArgs<vec.value> a{
        {{Part(c.num_kv_heads, c.k_dim), c.k, c.k_page, c.k_token, c.k_head, c.k_scale, c.ks_page,
          c.ks_token, p.k, to.k_token, to.k_head},
         {Part(c.num_kv_heads, c.v_dim), c.v, c.v_page, c.v_token, c.v_head, c.v_scale, c.vs_page,
          c.vs_token, p.v, to.v_token, to.v_head}},
        p.tables,
        p.places,
        p.kv_start,
        p.num_tokens,
        c.num_pages,
        block_shift(c.block_size),
        launch.info.num_sms * kMostBlocks,
        error_flag(op, launch.device)};
    TPD_CHECK(op, p.num_tokens < int64_t{1} << 30, p.num_tokens, " tokens, at most 2^30 - 1");
    start_overlapped(launch, kernel, ceil_div(2 * p.num_tokens, kThreads / 32), kThreads, a);
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 8> kEight;
  if (p.cache.k_scale) {
    dispatch_float(op, p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const bool wide = bytes_aligned<T>(p.cache, p.k, p.v, rows);
      if (p.cache.dtype == ScalarType::Char) {
        wide ? start(gather_kernel<int8_t, T, 8>, kEight, p.cache, rows)
             : start(gather_kernel<int8_t, T, 1>, kOne, p.cache, rows);
      } else {
        wide ? start(gather_kernel<Float8, T, 8>, kEight, p.cache, rows)
             : start(gather_kernel<Float8, T, 1>, kOne, p.cache, rows);
      }
    });
  } else {
    const int64_t item = p.dtype == ScalarType::Float ? 4 : 2;
    dispatch_word(p.cache, p.k, p.v, rows, item, [&](auto* type, int64_t wide) {
      using Word = std::remove_pointer_t<decltype(type)>;
      start(gather_kernel<Word, Word, 1>, kOne, in_words(p.cache, wide), in_words(rows, wide));
    });
  }
}

void copy_pages(const Tensor& src, const Tensor& dst, const Tensor& moves) {
  const char* op = "copy_pages";
  const CopyPages p = make_copy_pages(op, src, dst, moves);
  if (p.num_moves == 0 || p.page_bytes == 0) return;
  const Launch launch(op, src);
  const bool wide = aligned(p.src, 16) && aligned(p.dst, 16) && p.src_stride % 16 == 0 &&
                    p.dst_stride % 16 == 0 && p.page_bytes % 16 == 0;
  const int64_t chunks = ceil_div(p.page_bytes, kCopyThreads * kCopyUnroll * (wide ? 16 : 1));
  TPD_CHECK(op, p.num_moves * chunks < (int64_t{1} << 31), p.num_moves * chunks,
            " blocks in one launch, at most 2^31 - 1");
  start_overlapped(launch, wide ? copy_kernel<uint4> : copy_kernel<uint8_t>, p.num_moves * chunks,
                   kCopyThreads, p, FastDiv(chunks), error_flag(op, launch.device));
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("gather_kv", TORCH_BOX(&torch_pd::gather_kv));
  m.impl("copy_pages", TORCH_BOX(&torch_pd::copy_pages));
}
