// paged_attention and merge_attention on CUDA: which kernel takes which sequences.
#include <torch/csrc/stable/library.h>

#include "attention_launch.h"
#include "attention_plain.cuh"
#include "vec.cuh"

namespace torch_pd {

void launch_plain(AttentionCall call) {
  const Launch& launch = call.launch;
  TPD_CHECK(launch.op, call.v_dim <= kPlainColumns * 32, "v_cache is ", call.v_dim,
            " wide, at most ", kPlainColumns * 32, " is supported");
  call.args.min_rows = 0;
  call.args.max_rows = INT32_MAX;
  const int64_t rows = static_cast<int64_t>(call.args.num_tokens) * call.args.num_heads;
  const auto blocks = static_cast<unsigned>((rows + kPlainWarps - 1) / kPlainWarps);
  dispatch_float(launch.op, call.dtype, [&](auto* zero) {
    using T = std::remove_pointer_t<decltype(zero)>;
    auto* kernel = call.stored == kInt8     ? attention_plain<T, int8_t>
                   : call.stored == kFloat8 ? attention_plain<T, Float8>
                                            : attention_plain<T, T>;
    kernel<<<blocks, kPlainWarps * 32, 0, launch.stream>>>(call.args, call.head_dim, call.v_dim);
  });
  launch.check();
}

namespace {

// Sequences of at most this many packed rows go to the decode kernel.
constexpr int64_t kDecodeRows = 64;

bool fits_int32(int64_t x) { return x >= INT32_MIN && x <= INT32_MAX; }

AttentionArgs make_args(const Launch& launch, const Attention& p) {
  const char* op = launch.op;
  const KVCache& c = p.cache;
  const int64_t item = c.dtype == ScalarType::Float ? 4 : is_bytes(c.dtype) ? 1 : 2;
  for (int64_t n : {c.k_token * item * 64, c.v_token * item * 64, c.k_head * item * c.num_kv_heads,
                    c.v_head * item * c.num_kv_heads, c.ks_token * 64, c.vs_token * 64}) {
    TPD_CHECK(op, fits_int32(n), "a page of one layer must be smaller than 2 GiB");
  }
  TPD_CHECK(op, p.num_tokens * p.num_heads <= INT32_MAX && p.tables.num_seqs <= INT32_MAX,
            "at most 2^31 - 1 query rows, got ", p.num_tokens, " tokens x ", p.num_heads, " heads");
  AttentionArgs a = {};
  a.k = static_cast<const char*>(c.k), a.v = static_cast<const char*>(c.v);
  a.k_page = c.k_page * item, a.v_page = c.v_page * item;
  a.k_token = static_cast<int32_t>(c.k_token * item);
  a.v_token = static_cast<int32_t>(c.v_token * item);
  a.k_head = static_cast<int32_t>(c.k_head * item);
  a.v_head = static_cast<int32_t>(c.v_head * item);
  a.k_scale = c.k_scale, a.v_scale = c.v_scale;
  a.ks_page = c.ks_page, a.vs_page = c.vs_page;
  a.ks_token = static_cast<int32_t>(c.ks_token), a.vs_token = static_cast<int32_t>(c.vs_token);
  a.places = p.places.rows, a.num_places = static_cast<int32_t>(p.places.count);
  a.num_pages = static_cast<int32_t>(c.num_pages);
  a.block_shift = c.block_size == 16 ? 4 : c.block_size == 32 ? 5 : 6;
  a.tables = p.tables.block_tables, a.seq_lens = p.tables.seq_lens;
  a.query_start = p.query_start, a.table_stride = p.tables.table_stride;
  a.num_seqs = static_cast<int32_t>(p.tables.num_seqs);
  a.max_pages = static_cast<int32_t>(p.tables.max_pages);
  a.max_query_len = static_cast<int32_t>(std::min(p.max_query_len, p.num_tokens));
  a.q = p.q, a.out = p.out, a.lse = p.lse, a.sinks = p.sinks;
  a.q_token = p.q_token, a.q_head = p.q_head;
  a.out_token = p.out_token, a.out_head = p.out_head, a.lse_token = p.lse_token;
  a.num_tokens = static_cast<int32_t>(p.num_tokens);
  a.num_heads = static_cast<int32_t>(p.num_heads);
  a.num_kv_heads = static_cast<int32_t>(c.num_kv_heads);
  a.group = a.num_heads / a.num_kv_heads;
  a.window = static_cast<int32_t>(std::min<int64_t>(p.window, INT32_MAX));
  a.scale_log2 = p.scale * kLog2e;
  if (p.soft_cap > 0) a.scale_cap = p.scale / p.soft_cap, a.cap_log2 = p.soft_cap * kLog2e;
  a.errors = error_flag(op, launch.device);
  return a;
}

// What the tensor-core kernels take; everything else goes to the plain one.
bool fits_tensor_cores(const Attention& p, const AttentionArgs& a) {
  if (p.dtype == ScalarType::Float || !has_kernel(p.cache.k_dim) ||
      p.cache.v_dim != p.cache.k_dim) {
    return false;
  }
  bool fits = true;
  for (int64_t n :
       {reinterpret_cast<int64_t>(a.k), reinterpret_cast<int64_t>(a.v), a.k_page, a.v_page,
        int64_t{a.k_token}, int64_t{a.v_token}, int64_t{a.k_head}, int64_t{a.v_head}}) {
    fits = fits && n % 16 == 0;
  }
  for (int64_t n : {reinterpret_cast<int64_t>(a.q), reinterpret_cast<int64_t>(a.out), a.q_token * 2,
                    a.q_head * 2, a.out_token * 2, a.out_head * 2}) {
    fits = fits && n % 4 == 0;
  }
  return fits;
}

void paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start,
                     Tensor out, double scale, int64_t max_query_len, int64_t window,
                     double soft_cap, const OptTensor& sinks, const OptTensor& k_scale,
                     const OptTensor& v_scale, const OptTensor& places, OptTensor lse) {
  const char* op = "paged_attention";
  const Attention p =
      make_attention(op, q, k_cache, v_cache, block_tables, seq_lens, query_start, out, scale,
                     max_query_len, window, soft_cap, sinks, k_scale, v_scale, places, lse);
  if (p.num_tokens == 0 || p.tables.num_seqs == 0) return;
  const Launch launch(op, q);
  AttentionCall call{launch, q, make_args(launch, p)};
  call.head_dim = static_cast<int>(p.cache.k_dim), call.v_dim = static_cast<int>(p.cache.v_dim);
  call.dtype = p.dtype, call.stored = stored_as(p.cache.dtype);
  const AttentionArgs& a = call.args;
  if (!fits_tensor_cores(p, a)) return launch_plain(call);

  const int64_t rows = static_cast<int64_t>(a.max_query_len) * a.group;
  if (rows <= kDecodeRows) return launch_decode(call, static_cast<int>(rows));
  // A mixed batch: what has one tile of rows is decoded, unless all sequences must be longer.
  const int64_t one_tile = (a.group + 15) / 16 * 16;
  const bool mixed = one_tile <= kDecodeRows && a.num_seqs > 1 &&
                     a.num_tokens < static_cast<int64_t>(a.num_seqs) * a.max_query_len;
  const int min_rows = mixed ? static_cast<int>(one_tile) : 0;
  if (fits_sm90(call)) {
    launch_prefill_sm90(call, min_rows);
  } else {
    launch_prefill(call, min_rows);
  }
  if (mixed) launch_decode(call, min_rows);
}

// A warp folds one row of `other` into `out`.
constexpr int kMergeWarps = 4;

template <typename T>
__global__ void __launch_bounds__(kMergeWarps * 32)
    merge_kernel(const __grid_constant__ MergeAttention p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  const int64_t token = row / p.num_heads, head = row - token * p.num_heads;
  if (token >= p.num_tokens) return;
  float* lse = p.lse + token * p.lse_token + head;
  const float a_lse = *lse, b_lse = p.other_lse[token * p.other_lse_token + head];
  const float most = fmaxf(a_lse, b_lse);
  const bool none = most == -INFINITY;  // no keys on either side: out becomes 0
  const float a = none ? 0.0f : expf(a_lse - most), b = none ? 0.0f : expf(b_lse - most);
  const float sum = a + b, scale = none ? 0.0f : 1.0f / sum;
  T* out = static_cast<T*>(p.out) + token * p.out_token + head * p.out_head;
  const T* other = static_cast<const T*>(p.other) + token * p.other_token + head * p.other_head;
  for (int i = lane; i < p.head_dim; i += 32) {
    // A side without keys counts nothing, whatever its row holds.
    const float x = a == 0.0f ? 0.0f : to_float(out[i]) * (a * scale);
    const float y = b == 0.0f ? 0.0f : to_float(other[i]) * (b * scale);
    out[i] = from_float<T>(x + y);
  }
  __syncwarp();
  if (lane == 0) *lse = none ? -INFINITY : most + logf(sum);
}

void merge_attention(Tensor out, Tensor lse, const Tensor& other, const Tensor& other_lse) {
  const MergeAttention p = make_merge_attention("merge_attention", out, lse, other, other_lse);
  if (p.num_tokens == 0 || p.num_heads == 0) return;
  const Launch launch("merge_attention", out);
  const int64_t rows = p.num_tokens * p.num_heads;
  const auto blocks = static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps);
  dispatch_float(launch.op, p.dtype, [&](auto* zero) {
    using T = std::remove_pointer_t<decltype(zero)>;
    merge_kernel<T><<<blocks, kMergeWarps * 32, 0, launch.stream>>>(p);
  });
  launch.check();
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&torch_pd::paged_attention));
  m.impl("merge_attention", TORCH_BOX(&torch_pd::merge_attention));
}
