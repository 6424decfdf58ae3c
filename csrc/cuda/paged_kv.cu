// write_kv, gather_kv, copy_pages: scattering into pages, gathering from them, moving them whole.
// One pass over memory; a warp keeps up to eight 16-byte loads per lane in flight.
#include <torch/csrc/stable/library.h>

#include "cache.cuh"

namespace torch_pd {

namespace {

constexpr int kThreads = 128;

// Layout of one token's K and V heads; strides in elements.
struct Rows {
  int64_t k_token, k_head, v_token, v_head;
};

// Accesses per token: K heads, then V heads, `VEC` elements each.
struct Split {
  int k_count, count;
  FastDiv k_width, v_width;
  Split(const KVCache& c, int vec)
      : k_count(static_cast<int>(c.num_kv_heads * c.k_dim / vec)),
        count(k_count + static_cast<int>(c.num_kv_heads * c.v_dim / vec)),
        k_width(c.k_dim / vec),
        v_width(c.v_dim / vec) {}
};

template <typename Src, typename Dst>
__device__ __forceinline__ Dst convert(Src x, float scale) {
  if constexpr (std::is_same_v<Src, Dst>) {
    return x;
  } else {
    return from_float<Dst>(to_float(x) * scale);
  }
}

// One warp copies the heads of one token. k_scale, v_scale: [Hkv] of this token if Src is float8.
template <typename Src, typename Dst, int VEC>
__device__ __forceinline__ void copy_token(const Split& split, const Src* k_src, const Src* v_src,
                                           const Rows& src, Dst* k_dst, Dst* v_dst, const Rows& dst,
                                           const float* k_scale, const float* v_scale) {
  constexpr int kUnroll = VEC == 1 ? 8 : 4;  // converted values need registers
  const int lane = threadIdx.x % 32;
  for (int base = lane; base < split.count; base += 32 * kUnroll) {
    Vec<Src, VEC> in[kUnroll];
    float scale[kUnroll];
    Dst* to[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + 32 * u;
      to[u] = nullptr;
      if (i >= split.count) continue;
      const bool is_k = i < split.k_count;
      const int j = is_k ? i : i - split.k_count;
      const FastDiv& width = is_k ? split.k_width : split.v_width;
      const int head = width.div(j), column = (j - head * width.divisor) * VEC;
      in[u] = load_vec<VEC>(is_k ? k_src + head * src.k_head + column
                                 : v_src + head * src.v_head + column);
      to[u] = is_k ? k_dst + head * dst.k_head + column : v_dst + head * dst.v_head + column;
      if constexpr (!std::is_same_v<Src, Dst>) scale[u] = is_k ? k_scale[head] : v_scale[head];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (to[u] == nullptr) continue;
      Vec<Dst, VEC> out;
#pragma unroll
      for (int e = 0; e < VEC; ++e) out.at[e] = convert<Src, Dst>(in[u].at[e], scale[u]);
      store_vec(to[u], out);
    }
  }
}

struct WriteArgs {
  KVCache cache;
  const void *k, *v;
  int64_t num_tokens;
  Rows rows;
  const int64_t* slots;
  Split split;
  int32_t* flag;
};

// Cache and k, v of one storage type: a warp per token. Word is 16 bytes or one element.
template <typename Word>
__global__ void __launch_bounds__(kThreads) write_kernel(const WriteArgs a) {
  const int64_t token = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (token >= a.num_tokens) return;
  const Slot slot = locate_slot(a.cache, a.slots[token], a.flag, kWriteKV, threadIdx.x % 32 == 0);
  if (slot.page < 0) return;
  const KVCache& c = a.cache;
  copy_token<Word, Word, 1>(a.split, static_cast<const Word*>(a.k) + token * a.rows.k_token,
                            static_cast<const Word*>(a.v) + token * a.rows.v_token, a.rows,
                            static_cast<Word*>(c.k) + slot.page * c.k_page + slot.token * c.k_token,
                            static_cast<Word*>(c.v) + slot.page * c.v_page + slot.token * c.v_token,
                            {c.k_token, c.k_head, c.v_token, c.v_head}, nullptr, nullptr);
}

// A float8 cache: `lanes` threads per head find its largest magnitude, then store it scaled.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    write_fp8_kernel(const WriteArgs a, const int lanes, const FastDiv heads) {
  const int lane = threadIdx.x % lanes;
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / lanes;
  const int64_t token = heads.div(static_cast<uint32_t>(item));
  if (token >= a.num_tokens) return;  // whole groups of lanes leave; see the mask below
  const KVCache& c = a.cache;
  const int index = static_cast<int>(item - token * heads.divisor);
  const bool is_k = index < c.num_kv_heads;
  const int head = is_k ? index : index - static_cast<int>(c.num_kv_heads);
  const int dim = static_cast<int>(is_k ? c.k_dim : c.v_dim);
  const T* from = is_k ? static_cast<const T*>(a.k) + token * a.rows.k_token + head * a.rows.k_head
                       : static_cast<const T*>(a.v) + token * a.rows.v_token + head * a.rows.v_head;
  float amax = 0.0f;
  for (int i = lane * VEC; i < dim; i += lanes * VEC) {
    const Vec<T, VEC> in = load_vec<VEC>(from + i);
#pragma unroll
    for (int e = 0; e < VEC; ++e) amax = fmaxf(amax, fabsf(to_float(in.at[e])));
  }
  const unsigned group = (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1)
                         << (threadIdx.x % 32 / lanes * lanes);
  for (int step = lanes / 2; step > 0; step /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(group, amax, step));
  }
  const Slot slot = locate_slot(c, a.slots[token], a.flag, kWriteKV, index == 0 && lane == 0);
  if (slot.page < 0) return;
  const float scale = fp8_scale(amax);
  __nv_fp8_e4m3* to = is_k ? static_cast<__nv_fp8_e4m3*>(c.k) + slot.page * c.k_page +
                                 slot.token * c.k_token + head * c.k_head
                           : static_cast<__nv_fp8_e4m3*>(c.v) + slot.page * c.v_page +
                                 slot.token * c.v_token + head * c.v_head;
  for (int i = lane * VEC; i < dim; i += lanes * VEC) {
    const Vec<T, VEC> in = load_vec<VEC>(from + i);
    Vec<__nv_fp8_e4m3, VEC> out;
#pragma unroll
    for (int e = 0; e < VEC; ++e) out.at[e] = from_float<__nv_fp8_e4m3>(to_float(in.at[e]) / scale);
    store_vec(to + i, out);
  }
  if (lane == 0) {
    (is_k ? c.k_scale + slot.page * c.ks_page + slot.token * c.ks_token
          : c.v_scale + slot.page * c.vs_page + slot.token * c.vs_token)[head] = scale;
  }
}

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
  Split split;
  int32_t* flag;
};

// A warp per token. Src is float8 (converted to Dst) or one word type on both sides.
template <typename Src, typename Dst, int VEC>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherArgs a) {
  const int64_t token = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (token >= a.num_tokens) return;
  const bool reports = threadIdx.x % 32 == 0;
  const KVCache& c = a.cache;
  const int num_seqs = static_cast<int>(a.tables.num_seqs);
  const int seq = find_sequence(a.kv_start, num_seqs, token);
  const int64_t position = token - (num_seqs > 0 ? a.kv_start[seq] : 0);
  const int64_t length = num_seqs > 0 ? a.tables.seq_lens[seq] : 0;
  const int shift = block_shift(c.block_size);
  if (position < 0 || position >= length || position >> shift >= a.tables.max_pages) {
    if (reports) raise_flag(a.flag, kGatherKV, kBadLength, length);
    return;
  }
  const int32_t entry = a.tables.block_tables[seq * a.tables.table_stride + (position >> shift)];
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
  copy_token<Src, Dst, VEC>(
      a.split, reinterpret_cast<const Src*>(at(c.k, page * c.k_page + offset * c.k_token, item)),
      reinterpret_cast<const Src*>(at(c.v, page * c.v_page + offset * c.v_token, item)),
      {c.k_token, c.k_head, c.v_token, c.v_head}, static_cast<Dst*>(a.k) + token * a.rows.k_token,
      static_cast<Dst*>(a.v) + token * a.rows.v_token, a.rows, ks, vs);
}

constexpr int kCopyThreads = 256, kCopyUnroll = 8;

// One chunk of one page per block.
template <typename Word>
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(const CopyPages p, const FastDiv chunks, int32_t* const flag) {
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

void check_count(const char* op, int64_t count) {
  TPD_CHECK(op, count < (int64_t{1} << 31), count, " accesses in one launch, at most 2^31 - 1");
}

// Calls f with a null pointer of the widest word that every access of both sides is a multiple of.
template <typename F>
void dispatch_word(const KVCache& c, const void* k, const void* v, const Rows& rows, int64_t item,
                   F&& f) {
  const int64_t wide = 16 / item;
  bool fits = cache_aligned(c, item, 16, wide) && aligned(k, 16) && aligned(v, 16);
  for (int64_t n : {rows.k_token, rows.k_head, rows.v_token, rows.v_head}) {
    fits = fits && n % wide == 0;
  }
  if (fits) {
    f(static_cast<uint4*>(nullptr), wide);
  } else if (item == 4) {
    f(static_cast<uint32_t*>(nullptr), int64_t{1});
  } else {
    f(static_cast<uint16_t*>(nullptr), int64_t{1});
  }
}

Rows in_words(const Rows& r, int64_t n) {
  return {r.k_token / n, r.k_head / n, r.v_token / n, r.v_head / n};
}

// True if 8 elements of both sides of a float8 cache can move as one access.
template <typename T>
bool fp8_aligned(const KVCache& c, const void* k, const void* v, const Rows& rows) {
  bool yes = cache_aligned(c, 1, 8, 8) && aligned(k, 16) && aligned(v, 16);
  for (int64_t n : {rows.k_token, rows.k_head, rows.v_token, rows.v_head}) {
    yes = yes && n * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  }
  return yes;
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slots, const OptTensor& k_scale, const OptTensor& v_scale) {
  const char* op = "write_kv";
  const WriteKV p = make_write_kv(op, k, v, k_cache, v_cache, slots, k_scale, v_scale);
  if (p.num_tokens == 0) return;
  const Launch launch(op, k_cache);
  const Rows rows{p.k_token, p.k_head, p.v_token, p.v_head};
  WriteArgs a{p.cache,
              p.k,
              p.v,
              p.num_tokens,
              rows,
              p.slots,
              Split(p.cache, 1),
              error_flag(op, launch.device)};
  if (p.cache.k_scale) {
    const int64_t heads = 2 * p.cache.num_kv_heads;
    const int64_t dim = std::max(p.cache.k_dim, p.cache.v_dim);
    check_count(op, (p.num_tokens + kThreads) * heads);
    dispatch_float(op, p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const auto start = [&](auto vec) {
        const int lanes = lanes_for(dim / vec.value);
        const auto blocks = ceil_div(p.num_tokens * heads * lanes, kThreads);
        check_count(op, blocks);
        write_fp8_kernel<T, vec.value>
            <<<static_cast<unsigned>(blocks), kThreads, 0, launch.stream>>>(a, lanes,
                                                                            FastDiv(heads));
      };
      if (fp8_aligned<T>(p.cache, p.k, p.v, rows)) {
        start(std::integral_constant<int, 8>());
      } else {
        start(std::integral_constant<int, 1>());
      }
    });
  } else {
    const int64_t item = p.dtype == ScalarType::Float ? 4 : 2;
    const auto blocks = static_cast<unsigned>(ceil_div(p.num_tokens, kThreads / 32));
    dispatch_word(p.cache, p.k, p.v, rows, item, [&](auto* type, int64_t wide) {
      using Word = std::remove_pointer_t<decltype(type)>;
      a.cache = in_words(p.cache, wide);
      a.rows = in_words(rows, wide);
      a.split = Split(a.cache, 1);
      write_kernel<Word><<<blocks, kThreads, 0, launch.stream>>>(a);
    });
  }
  launch.check();
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
  GatherArgs a{p.cache, p.tables,     p.places, p.kv_start,        p.k,
               p.v,     p.num_tokens, rows,     Split(p.cache, 1), error_flag(op, launch.device)};
  const auto blocks = static_cast<unsigned>(ceil_div(p.num_tokens, kThreads / 32));
  if (p.cache.k_scale) {
    dispatch_float(op, p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (fp8_aligned<T>(p.cache, p.k, p.v, rows)) {
        a.split = Split(p.cache, 8);
        gather_kernel<__nv_fp8_e4m3, T, 8><<<blocks, kThreads, 0, launch.stream>>>(a);
      } else {
        gather_kernel<__nv_fp8_e4m3, T, 1><<<blocks, kThreads, 0, launch.stream>>>(a);
      }
    });
  } else {
    const int64_t item = p.dtype == ScalarType::Float ? 4 : 2;
    dispatch_word(p.cache, p.k, p.v, rows, item, [&](auto* type, int64_t wide) {
      using Word = std::remove_pointer_t<decltype(type)>;
      a.cache = in_words(p.cache, wide);
      a.rows = in_words(rows, wide);
      a.split = Split(a.cache, 1);
      gather_kernel<Word, Word, 1><<<blocks, kThreads, 0, launch.stream>>>(a);
    });
  }
  launch.check();
}

void copy_pages(const Tensor& src, const Tensor& dst, const Tensor& moves) {
  const char* op = "copy_pages";
  const CopyPages p = make_copy_pages(op, src, dst, moves);
  if (p.num_moves == 0 || p.page_bytes == 0) return;
  const Launch launch(op, src);
  const bool wide = aligned(p.src, 16) && aligned(p.dst, 16) && p.src_stride % 16 == 0 &&
                    p.dst_stride % 16 == 0 && p.page_bytes % 16 == 0;
  const int64_t chunks = ceil_div(p.page_bytes, kCopyThreads * kCopyUnroll * (wide ? 16 : 1));
  check_count(op, p.num_moves * chunks);
  const auto blocks = static_cast<unsigned>(p.num_moves * chunks);
  if (wide) {
    copy_kernel<uint4><<<blocks, kCopyThreads, 0, launch.stream>>>(p, FastDiv(chunks),
                                                                   error_flag(op, launch.device));
  } else {
    copy_kernel<uint8_t><<<blocks, kCopyThreads, 0, launch.stream>>>(p, FastDiv(chunks),
                                                                     error_flag(op, launch.device));
  }
  launch.check();
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("write_kv", TORCH_BOX(&torch_pd::write_kv));
  m.impl("gather_kv", TORCH_BOX(&torch_pd::gather_kv));
  m.impl("copy_pages", TORCH_BOX(&torch_pd::copy_pages));
}
