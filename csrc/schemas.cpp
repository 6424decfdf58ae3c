// Every op of torch.ops.torch_pd. Bodies: csrc/cpu and csrc/cuda. Typed Python faces, docs and
// fakes: torch_pd/ops.py. Shapes are in the comments; sizes in brackets.
//
//   T tokens, H query heads, Hkv KV heads, D head_dim, P pages, B block_size, S sequences, N places
//
// A layer's cache is a strided view [P, B, Hkv, D] of the pool (page stride free, last dim
// contiguous); K and V may differ in width. Slots are int64 `page * B + offset`, -1 = padding.
// Block table entries are int32 `place << 28 | index`.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_pd, m) {
  // k, v [T, Hkv, D]; slots [T]; scales float32 [P, B, Hkv] when the cache is uint8 (float8 of
  // three exponent and four mantissa bits) or int8.
  m.def(
      "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, *, "
      "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()");
  // block_tables int32 [S, max_pages]; seq_lens int32 [S]; kv_start int32 [S + 1], cumulative
  // lengths; k, v [sum of lengths, Hkv, D] outputs; places int64 [N, 2] (base address, pages).
  m.def(
      "gather_kv(Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, "
      "Tensor kv_start, Tensor(a!) k, Tensor(b!) v, *, Tensor? k_scale=None, "
      "Tensor? v_scale=None, Tensor? places=None) -> ()");
  // src, dst [pages, ...] of one dtype and page shape, each page contiguous; moves int64
  // [M, 2] rows (src page, dst page).
  m.def("copy_pages(Tensor src, Tensor(a!) dst, Tensor moves) -> ()");
  // qkv [T, (H + 2 Hkv) * D], merged rows, in blocks of shards if shard_heads (KV heads per
  // shard) is given: q0 k0 v0 q1 k1 v1 ...; blocked: the columns of each shard are a contiguous
  // block [T, columns], one behind the other; q [T, H, D] output; cos, sin [T, R], R <= D even;
  // q_norm, k_norm [D] (each head) or [H * D], [Hkv * D] (all heads at once); weight used is
  // norm_offset + norm.
  m.def(
      "rope_write_kv(Tensor qkv, Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache, "
      "Tensor slots, *, Tensor? cos=None, Tensor? sin=None, Tensor? q_norm=None, "
      "Tensor? k_norm=None, float eps=1e-06, float norm_offset=0.0, int[]? shard_heads=None, "
      "bool blocked=False, Tensor(d!)? k_scale=None, Tensor(e!)? v_scale=None) -> ()");
  // q [T, H, D]; out [T, H, Dv] output; query_start int32 [S + 1] cumulative; the last query of a
  // sequence sits at position seq_len - 1. window 0 = none, else keys with q_pos - k_pos < window.
  // soft_cap 0 = none. sinks float32 [H]. lse float32 [T, H] output (natural log).
  // max_query_len bounds the query tokens of any one sequence and may choose the kernel.
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
      "Tensor seq_lens, Tensor query_start, Tensor(a!) out, float scale, int max_query_len, *, "
      "int window=0, float soft_cap=0.0, Tensor? sinks=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None, Tensor? places=None, Tensor(b!)? lse=None) -> ()");
  // Folds a second partial result over other keys into the first. out, other [T, H, Dv];
  // lse, other_lse float32 [T, H].
  m.def("merge_attention(Tensor(a!) out, Tensor(b!) lse, Tensor other, Tensor other_lse) -> ()");
  // x, out, residual [T, C]; weight [C]. With residual: residual += scale * x (rounded to its
  // dtype), out = norm(residual) * (offset + weight). Without: out = norm(x) * (offset + weight).
  m.def(
      "rms_norm(Tensor x, Tensor weight, Tensor(a!) out, float eps, *, "
      "Tensor(b!)? residual=None, float scale=1.0, float offset=0.0) -> ()");
  // x [T, 2 * W] gate and up, in blocks of shards if shard_widths is given: gate0 up0 gate1 up1
  // ...; out [T, W] = act(gate) * up. activation: "silu", "gelu", "gelu_tanh".
  m.def("gated_act(Tensor x, Tensor(a!) out, str activation, *, int[]? shard_widths=None) -> ()");
  // x [T, W] to blocks [T, widths[s]], contiguous and one behind the other in out [T * W], and
  // blocks x [T * W] to columns of out [T, W]: what exchanges between shards send and receive.
  m.def("pack_shards(Tensor x, Tensor(a!) out, int[] widths) -> ()");
  m.def("unpack_shards(Tensor x, Tensor(a!) out, int[] widths) -> ()");
  // out [M, N] = x [M, K] weight [N, K]^T + bias [N]. A row of out depends on its row of x alone,
  // bit for bit, whatever M is. CPU only: on CUDA linears are cuBLAS.
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  // CUDA only; engine/draw.py is the same in plain torch. logits [n, V], any row stride; entries
  // int32 [E, 3] rows (row of logits or -1: none, token, its count in the output or -1: no
  // penalties), no (row, token) twice; bias float32 [E]; penalties float32 [n, 3] (repetition,
  // frequency, presence).
  m.def("adjust_logits(Tensor(a!) logits, Tensor entries, Tensor bias, Tensor penalties) -> ()");
  // CUDA only. tokens int64 [n] output, -1 for a row with NaN or infinity or nothing but -infinity;
  // settings float64 [n, 3] (temperature, top_p, min_p); keys int64 [n, 4] (top_k, seed, index,
  // position). Without them every row takes its best token.
  m.def("sample(Tensor logits, Tensor(a!) tokens, Tensor? settings=None, Tensor? keys=None) -> ()");
  // CUDA only. sends, receives: for each rank (first element, rows, columns, row stride) of a
  // matrix in contiguous x, out. inbox uint8 of this rank; inboxes: addresses of all ranks' as
  // mapped here.
  m.def(
      "exchange(Tensor x, Tensor(a!) out, Tensor(b!) inbox, int[] inboxes, int rank, int[] sends, "
      "int[] receives, bool add, int blocks, float timeout_s) -> ()");
  // The error flag of the device of `like`, int32 [4] there: {number of dropped accesses, op |
  // error
  // << 8, value low, value high} of the first one (csrc/cuda/common.cuh). CPU: zeros, since the CPU
  // bodies raise at once.
  m.def("device_errors(Tensor like, bool reset) -> Tensor");
  // The instruction set that the CPU bodies run with: base, avx2, avx512 or avx512bf16.
  m.def("cpu_isa() -> str");
}
