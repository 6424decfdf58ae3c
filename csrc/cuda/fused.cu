// rms_norm (with residual) and gated_act: one kernel and one pass over memory each.
#include <torch/csrc/stable/library.h>

#include "../params.h"
#include "vec.cuh"

namespace torch_pd {

namespace {

constexpr int kMaxThreads = 1024;
// Widest row, in accesses, that a block of rms_norm holds in registers.
constexpr int kMaxAccesses = 2048;

template <typename T>
struct Row {
  const T *x, *weight;
  T *out, *residual;  // residual null if not given
};

template <typename T>
__device__ __forceinline__ Row<T> row_of(const RmsNorm& p, int64_t token) {
  T* residual = static_cast<T*>(p.residual);
  return {static_cast<const T*>(p.x) + token * p.x_token, static_cast<const T*>(p.weight),
          static_cast<T*>(p.out) + token * p.out_token,
          residual ? residual + token * p.residual_token : nullptr};
}

// Reads one access of x; with a residual adds it there and stores that. Returns the values to
// normalise, as they are stored.
template <typename T, int VEC>
__device__ __forceinline__ Vec<T, VEC> read_x(const RmsNorm& p, const Row<T>& row, int64_t column) {
  Vec<T, VEC> x = load_vec<VEC>(row.x + column);
  if (row.residual == nullptr) return x;
  const Vec<T, VEC> r = load_vec<VEC>(row.residual + column);
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    x.at[e] = from_float<T>(to_float(r.at[e]) + p.scale * to_float(x.at[e]));
  }
  return x;
}

template <typename T, int VEC>
__device__ __forceinline__ float squares_of(const Vec<T, VEC>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < VEC; ++e) sum += to_float(x.at[e]) * to_float(x.at[e]);
  return sum;
}

template <typename T, int VEC>
__device__ __forceinline__ void write_out(const RmsNorm& p, const Row<T>& row, int64_t column,
                                          const Vec<T, VEC>& x, const Vec<T, VEC>& weight,
                                          float factor) {
  Vec<T, VEC> out;
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    out.at[e] = from_float<T>(to_float(x.at[e]) * factor * (p.offset + to_float(weight.at[e])));
  }
  store_vec(row.out + column, out);
}

// One block per row, which it holds in registers: HELD accesses per thread.
template <typename T, int VEC, int HELD>
__global__ void __launch_bounds__(HELD == 4 ? 512 : kMaxThreads) rms_norm_kernel(const RmsNorm p) {
  __shared__ float partial[32];
  const Row<T> row = row_of<T>(p, blockIdx.x);
  Vec<T, VEC> x[HELD], weight[HELD];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int column = (static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x)) * VEC;
    if (column >= p.width) continue;
    x[i] = read_x<T, VEC>(p, row, column);
    weight[i] = load_vec<VEC>(row.weight + column);
  }
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int column = (static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x)) * VEC;
    if (column >= p.width) continue;
    if (row.residual != nullptr) store_vec(row.residual + column, x[i]);
    squares += squares_of(x[i]);
  }
  const float factor = rsqrtf(block_sum(squares, partial) / static_cast<float>(p.width) + p.eps);
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int column = (static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x)) * VEC;
    if (column >= p.width) continue;
    keep_packed(x[i]);
    write_out(p, row, column, x[i], weight[i], factor);
  }
}

// Rows too wide for registers, or unaligned: each thread reads its own columns twice.
template <typename T, int VEC>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_wide_kernel(const RmsNorm p) {
  __shared__ float partial[32];
  const Row<T> row = row_of<T>(p, blockIdx.x);
  const int64_t step = blockDim.x * VEC;
  float squares = 0.0f;
  for (int64_t column = threadIdx.x * VEC; column < p.width; column += step) {
    const Vec<T, VEC> x = read_x<T, VEC>(p, row, column);
    if (row.residual != nullptr) store_vec(row.residual + column, x);
    squares += squares_of(x);
  }
  const float factor = rsqrtf(block_sum(squares, partial) / static_cast<float>(p.width) + p.eps);
  const T* source = row.residual != nullptr ? row.residual : row.x;
  for (int64_t column = threadIdx.x * VEC; column < p.width; column += step) {
    write_out(p, row, column, load_vec<VEC>(source + column), load_vec<VEC>(row.weight + column),
              factor);
  }
}

int round_to_warps(int64_t threads) { return static_cast<int>(ceil_div(threads, 32) * 32); }

template <typename T>
void launch_rms_norm(const RmsNorm& p, const Launch& launch) {
  constexpr int kVec = 16 / sizeof(T);
  const auto blocks = static_cast<unsigned>(p.num_tokens);
  const bool fits = p.width % kVec == 0 && p.x_token % kVec == 0 && p.out_token % kVec == 0 &&
                    p.residual_token % kVec == 0 && aligned(p.x, 16) && aligned(p.weight, 16) &&
                    aligned(p.out, 16) && (p.residual == nullptr || aligned(p.residual, 16));
  const int64_t accesses = fits ? p.width / kVec : p.width;
  if (!fits || accesses > kMaxAccesses) {
    const int threads = std::min(kMaxThreads, round_to_warps(accesses));
    if (fits) {
      rms_norm_wide_kernel<T, kVec><<<blocks, threads, 0, launch.stream>>>(p);
    } else {
      rms_norm_wide_kernel<T, 1><<<blocks, threads, 0, launch.stream>>>(p);
    }
    return;
  }
  // Few rows: as many threads per row as there are accesses. Many: smaller blocks, several on each
  // multiprocessor, so that one's sum overlaps with another's loads.
  const bool few = p.num_tokens <= 2 * launch.info.num_sms;
  const int64_t most = few ? kMaxThreads : 512;
  const int held = accesses <= most ? 1 : accesses <= 2 * most ? 2 : 4;
  const int threads = round_to_warps(ceil_div(accesses, held));
  if (held == 1) {
    rms_norm_kernel<T, kVec, 1><<<blocks, threads, 0, launch.stream>>>(p);
  } else if (held == 2) {
    rms_norm_kernel<T, kVec, 2><<<blocks, threads, 0, launch.stream>>>(p);
  } else {
    rms_norm_kernel<T, kVec, 4><<<blocks, threads, 0, launch.stream>>>(p);
  }
}

void rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out, double eps,
              const OptTensor& residual, double scale, double offset) {
  const char* op = "rms_norm";
  const RmsNorm p = make_rms_norm(op, x, weight, out, eps, residual, scale, offset);
  if (p.num_tokens == 0 || p.width == 0) return;
  TPD_CHECK(op, p.num_tokens < (int64_t{1} << 31), p.num_tokens, " rows, at most 2^31 - 1");
  const Launch launch(op, x);
  dispatch_float(op, p.dtype, [&](auto* type) {
    launch_rms_norm<std::remove_pointer_t<decltype(type)>>(p, launch);
  });
  launch.check();
}

// x * sigmoid(x) and its like; float32 values get the accurate exponential.
template <Activation KIND, bool ACCURATE>
__device__ __forceinline__ float activate(float x) {
  if constexpr (KIND == Activation::kSilu) {
    return ACCURATE ? x / (1.0f + expf(-x)) : __fdividef(x, 1.0f + __expf(-x));
  } else if constexpr (KIND == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const float y = x * (1.5957691216f + 0.0713548128f * x * x);
    return ACCURATE ? x / (1.0f + expf(-y)) : __fdividef(x, 1.0f + __expf(-y));
  } else {
    return x * normcdff(x);
  }
}

constexpr int kMaxShards = 64;  // params.h allows no more

struct GatedArgs {
  const void* x;
  void* out;
  int64_t x_token, out_token;
  int accesses;
  FastDiv chunks;             // blocks per row
  int start[kMaxShards + 1];  // first access of a shard's part of out
};

// A block does HELD accesses per thread of one row.
template <typename T, int VEC, int HELD, Activation KIND>
__global__ void __launch_bounds__(512) gated_act_kernel(const __grid_constant__ GatedArgs a) {
  const uint32_t token = a.chunks.div(blockIdx.x);
  const int chunk = static_cast<int>(blockIdx.x - token * a.chunks.divisor);
  const int first = chunk * static_cast<int>(blockDim.x) * HELD + static_cast<int>(threadIdx.x);
  const T* x = static_cast<const T*>(a.x) + token * a.x_token;
  T* out = static_cast<T*>(a.out) + token * a.out_token;
  Vec<T, VEC> gate[HELD], up[HELD];
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int access = first + i * static_cast<int>(blockDim.x);
    if (access >= a.accesses) continue;
    int shard = 0;
    while (access >= a.start[shard + 1]) ++shard;
    const T* from = x + int64_t{a.start[shard] + access} * VEC;
    gate[i] = load_vec<VEC>(from);
    up[i] = load_vec<VEC>(from + int64_t{a.start[shard + 1] - a.start[shard]} * VEC);
  }
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int access = first + i * static_cast<int>(blockDim.x);
    if (access >= a.accesses) continue;
    Vec<T, VEC> result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      result.at[e] =
          from_float<T>(activate<KIND, std::is_same_v<T, float>>(to_float(gate[i].at[e])) *
                        to_float(up[i].at[e]));
    }
    store_vec(out + int64_t{access} * VEC, result);
  }
}

template <typename T, int VEC, Activation KIND>
void launch_gated_act(const GatedAct& p, const Launch& launch) {
  constexpr int kHeld = 2;
  GatedArgs a{p.x, p.out, p.x_token, p.out_token, static_cast<int>(p.width / VEC), FastDiv(1), {}};
  for (size_t s = 0; s < p.shard_widths.size(); ++s) {
    a.start[s + 1] = a.start[s] + static_cast<int>(p.shard_widths[s] / VEC);
  }
  // The block size that leaves the fewest threads of a row without work.
  int threads = 128;
  const auto blocks_of = [&](int n) { return ceil_div(a.accesses, int64_t{n} * kHeld); };
  for (int n = 160; n <= 512; n += 32) {
    if (blocks_of(n) * n <= blocks_of(threads) * threads) threads = n;
  }
  const int64_t chunks = blocks_of(threads);
  TPD_CHECK(launch.op, p.num_tokens * chunks < (int64_t{1} << 31), p.num_tokens, " rows x ", chunks,
            " blocks, at most 2^31 - 1");
  a.chunks = FastDiv(chunks);
  gated_act_kernel<T, VEC, kHeld, KIND>
      <<<static_cast<unsigned>(p.num_tokens * chunks), threads, 0, launch.stream>>>(a);
}

template <typename T, Activation KIND>
void launch_gated_act_of(const GatedAct& p, const Launch& launch) {
  constexpr int kVec = 16 / sizeof(T);
  bool fits =
      p.x_token % kVec == 0 && p.out_token % kVec == 0 && aligned(p.x, 16) && aligned(p.out, 16);
  for (int64_t width : p.shard_widths) fits = fits && width % kVec == 0;
  if (fits) {
    launch_gated_act<T, kVec, KIND>(p, launch);
  } else {
    launch_gated_act<T, 1, KIND>(p, launch);
  }
}

void gated_act(const Tensor& x, const Tensor& out, const std::string& activation,
               const std::optional<std::vector<int64_t>>& shard_widths) {
  const char* op = "gated_act";
  const GatedAct p = make_gated_act(op, x, out, activation, shard_widths);
  if (p.num_tokens == 0 || p.width == 0) return;
  TPD_CHECK(op, p.width < (int64_t{1} << 30), "out is ", p.width, " wide, at most 2^30 - 1");
  const Launch launch(op, x);
  dispatch_float(op, p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    switch (p.activation) {
      case Activation::kSilu: return launch_gated_act_of<T, Activation::kSilu>(p, launch);
      case Activation::kGelu: return launch_gated_act_of<T, Activation::kGelu>(p, launch);
      case Activation::kGeluTanh: return launch_gated_act_of<T, Activation::kGeluTanh>(p, launch);
    }
  });
  launch.check();
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&torch_pd::rms_norm));
  m.impl("gated_act", TORCH_BOX(&torch_pd::gated_act));
}
