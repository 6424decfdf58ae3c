// gather_kv, copy_pages: gathering from pages and moving them whole, in one pass over memory.
#include <torch/csrc/stable/library.h>

#include "cache.cuh"
#include "overlap.cuh"

namespace torch_pd {

namespace {

constexpr int kThreads = 128;

// Largest s in [0, num_seqs) with start[s] <= token; each round a warp probes 32 places. Any values
// of `start` end in that range.
__device__ __forceinline__ int find_sequence(const int32_t* start, int num_seqs, int64_t token) {
  int low = 0, high = num_seqs;
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int probe = low + (static_cast<int>(threadIdx.x % 32) + 1) * step;
    const bool below = probe < high && start[probe] <= token;
    low += step * __popc(__ballot_sync(0xffffffffu, below));
    high = min(high, low + step);
  }
  return low;
}

struct GatherArgs {
  KVCache cache;
  Tables tables;
  Places places;
  const int32_t* kv_start;
  void *k, *v;
  int64_t num_tokens;
  Rows rows;
  int32_t* flag;
};

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

// Writes what read_heads got, times its scales if Src is float8.
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

// A warp per token. Src is float8 (converted to Dst) or one word type on both sides.
template <typename Src, typename Dst, int VEC>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ GatherArgs a, const __grid_constant__ Heads<VEC> k_heads,
                  const __grid_constant__ Heads<VEC> v_heads) {
  const int lane = threadIdx.x % 32, num_seqs = static_cast<int>(a.tables.num_seqs);
  const int64_t token = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (lane < num_seqs) {
    prefetch_l2(a.kv_start + lane);
    prefetch_l2(a.tables.seq_lens + lane);
  }
  after_previous();
  if (token >= a.num_tokens) return;
  const bool reports = lane == 0;
  const KVCache& c = a.cache;
  const int seq = find_sequence(a.kv_start, num_seqs, token);
  const int64_t length = num_seqs > 0 ? a.tables.seq_lens[seq] : 0;
  const int64_t position = num_seqs > 0 ? token - a.kv_start[seq] : -1;
  const int64_t row = position >> block_shift(c.block_size);
  const bool in_table = position >= 0 && row < a.tables.max_pages;
  // Read before the length has come.
  const int32_t entry = in_table ? a.tables.block_tables[seq * a.tables.table_stride + row] : 0;
  if (!in_table || position >= length) {
    if (reports) raise_flag(a.flag, kGatherKV, kBadLength, length);
    return;
  }
  const int64_t place = static_cast<uint32_t>(entry) >> kPlaceShift;
  const int64_t page = entry & kPageIndexMask;
  int64_t pages = 0, moved = 0;  // pool size, its distance in bytes from this one
  if (place == 0) {
    pages = c.num_pages;
  } else if (place < a.places.count) {
    pages = a.places.rows[2 * place + 1];
    moved = a.places.rows[2 * place] - a.places.rows[0];
  }
  if (page >= pages) {
    if (reports)
      raise_flag(a.flag, kGatherKV, place > 0 && place >= a.places.count ? kBadPlace : kBadPage,
                 entry);
    return;
  }
  const int64_t offset = position & (c.block_size - 1);
  const auto at = [&](const void* base, int64_t elements, int64_t item) {
    return static_cast<const char*>(base) + moved + elements * item;
  };
  const int64_t item = sizeof(Src);
  const float *ks = nullptr, *vs = nullptr;
  if constexpr (!std::is_same_v<Src, Dst>) {
    ks = reinterpret_cast<const float*>(at(c.k_scale, page * c.ks_page + offset * c.ks_token, 4));
    vs = reinterpret_cast<const float*>(at(c.v_scale, page * c.vs_page + offset * c.vs_token, 4));
  }
  const auto* k_from =
      reinterpret_cast<const Src*>(at(c.k, page * c.k_page + offset * c.k_token, item));
  const auto* v_from =
      reinterpret_cast<const Src*>(at(c.v, page * c.v_page + offset * c.v_token, item));
  Dst* k_to = static_cast<Dst*>(a.k) + token * a.rows.k_token;
  Dst* v_to = static_cast<Dst*>(a.v) + token * a.rows.v_token;
  const int count = max(k_heads.count, v_heads.count);
  for (int first = lane; first < count; first += 32 * kHeld) {
    Vec<Src, VEC> k[kHeld], v[kHeld];
    read_heads(k_heads, k_from, c.k_head, first, k);
    read_heads(v_heads, v_from, c.v_head, first, v);
    float k_scale[kHeld], v_scale[kHeld];
    if constexpr (!std::is_same_v<Src, Dst>) {
      read_scales(k_heads, ks, first, k_scale);
      read_scales(v_heads, vs, first, v_scale);
    }
    put_heads(k_heads, k_to, a.rows.k_head, first, k, k_scale);
    put_heads(v_heads, v_to, a.rows.v_head, first, v, v_scale);
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
  GatherArgs a{p.cache,      p.tables, p.places,
               p.kv_start,   p.k,      p.v,
               p.num_tokens, rows,     error_flag(op, launch.device)};
  const auto start = [&](auto* kernel, auto vec) {
    using Part = Heads<vec.value>;
    start_overlapped(launch, kernel, ceil_div(p.num_tokens, kThreads / 32), kThreads, a,
                     Part(a.cache.num_kv_heads, a.cache.k_dim),
                     Part(a.cache.num_kv_heads, a.cache.v_dim));
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 8> kEight;
  if (p.cache.k_scale) {
    dispatch_float(op, p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (fp8_aligned<T>(p.cache, p.k, p.v, rows)) {
        start(gather_kernel<__nv_fp8_e4m3, T, 8>, kEight);
      } else {
        start(gather_kernel<__nv_fp8_e4m3, T, 1>, kOne);
      }
    });
  } else {
    const int64_t item = p.dtype == ScalarType::Float ? 4 : 2;
    dispatch_word(p.cache, p.k, p.v, rows, item, [&](auto* type, int64_t wide) {
      using Word = std::remove_pointer_t<decltype(type)>;
      a.cache = in_words(p.cache, wide);
      a.rows = in_words(rows, wide);
      start(gather_kernel<Word, Word, 1>, kOne);
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
