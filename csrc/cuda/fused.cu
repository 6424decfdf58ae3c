// rms_norm (with residual) and gated_act: one kernel and one pass over memory each.
#include <torch/csrc/stable/library.h>

#include "../params/fused.h"
#include "overlap.cuh"
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
  float out[VEC];
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    out[e] = to_float(x.at[e]) * factor * (p.offset + to_float(weight.at[e]));
  }
  store_vec(row.out + column, narrow<T, VEC>(out));
}

// A block holds ROWS rows in registers: HELD accesses of each per thread, all loaded before the
// first is used. Few registers a thread: as many rows are on their way to a multiprocessor as it
// takes to keep its memory busy.
template <typename T, int VEC, int HELD, int ROWS>
__global__ void __maxnreg__(HELD* ROWS > 4 ? 64 : 48) rms_norm_kernel(const RmsNorm p) {
  __shared__ float partial[ROWS][32];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / 32, lane = thread % 32, warps = threads / 32;
  const int64_t first = int64_t{blockIdx.x} * ROWS;
  const T* weights = static_cast<const T*>(p.weight);
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int column = (thread + i * threads) * VEC;
    if (column < p.width) ptx::prefetch_l2(weights + column);
  }
  after_previous();
  constexpr bool kEarly = HELD * ROWS < 4;  // there are registers to load the weight early
  Vec<T, VEC> x[ROWS][HELD], weight[HELD];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (first + r >= p.num_tokens) continue;
    const Row<T> row = row_of<T>(p, first + r);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int column = (thread + i * threads) * VEC;
      if (column >= p.width) continue;
      x[r][i] = read_x<T, VEC>(p, row, column);
      if (kEarly) weight[i] = load_vec<VEC>(weights + column);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float squares = 0.0f;
    const Row<T> row = row_of<T>(p, first + r);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int column = (thread + i * threads) * VEC;
      if (column >= p.width || first + r >= p.num_tokens) continue;
      if (row.residual != nullptr) store_vec(row.residual + column, x[r][i]);
      squares += squares_of(x[r][i]);
    }
    squares = warp_sum(squares);
    if (lane == 0) partial[r][warp] = squares;
  }
  __syncthreads();
  float factor[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float squares = warp_sum(lane < warps ? partial[r][lane] : 0.0f);
    factor[r] = rsqrtf(squares / static_cast<float>(p.width) + p.eps);
  }
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int column = (thread + i * threads) * VEC;
    if (column >= p.width) continue;
    if (!kEarly) weight[i] = load_vec<VEC>(weights + column);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first + r >= p.num_tokens) continue;
      keep_packed(x[r][i]);
      write_out(p, row_of<T>(p, first + r), column, x[r][i], weight[i], factor[r]);
    }
  }
}

// Rows too wide for registers, or unaligned: each thread reads its own columns twice.
template <typename T, int VEC>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_wide_kernel(const RmsNorm p) {
  __shared__ float partial[32];
  after_previous();
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
  const bool fits = p.width % kVec == 0 && p.x_token % kVec == 0 && p.out_token % kVec == 0 &&
                    p.residual_token % kVec == 0 && aligned(p.x, 16) && aligned(p.weight, 16) &&
                    aligned(p.out, 16) && (p.residual == nullptr || aligned(p.residual, 16));
  const int64_t accesses = fits ? p.width / kVec : p.width;
  if (!fits || accesses > kMaxAccesses) {
    const int threads = std::min(kMaxThreads, round_to_warps(accesses));
    start_overlapped(launch, fits ? rms_norm_wide_kernel<T, kVec> : rms_norm_wide_kernel<T, 1>,
                     p.num_tokens, threads, p);
    return;
  }
  // Few rows: as many threads per row as there are accesses. Many: smaller blocks, several on each
  // multiprocessor, so that one's sum overlaps with another's loads, and four loads per thread.
  const bool few = p.num_tokens <= 2 * launch.info.num_sms;
  const bool packed = !few && p.residual == nullptr;
  const int64_t most = few ? kMaxThreads : packed ? 128 : 512;
  const int held = accesses <= most ? 1 : accesses <= 2 * most ? 2 : 4;
  const int threads = round_to_warps(ceil_div(accesses, held));
  const auto start = [&](auto* kernel, int rows) {
    start_overlapped(launch, kernel, ceil_div(p.num_tokens, rows), threads, p);
  };
  if (held == 4) {
    packed ? start(rms_norm_kernel<T, kVec, 4, 2>, 2) : start(rms_norm_kernel<T, kVec, 4, 1>, 1);
  } else if (held == 2) {
    packed ? start(rms_norm_kernel<T, kVec, 2, 2>, 2) : start(rms_norm_kernel<T, kVec, 2, 1>, 1);
  } else {
    packed ? start(rms_norm_kernel<T, kVec, 1, 4>, 4) : start(rms_norm_kernel<T, kVec, 1, 1>, 1);
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
  after_previous();
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
    float result[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      result[e] =
          activate<KIND, std::is_same_v<T, float>>(to_float(gate[i].at[e])) * to_float(up[i].at[e]);
    }
    store_vec(out + int64_t{access} * VEC, narrow<T, VEC>(result));
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
  start_overlapped(launch, gated_act_kernel<T, VEC, kHeld, KIND>, p.num_tokens * chunks, threads,
                   a);
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
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&torch_pd::rms_norm));
  m.impl("gated_act", TORCH_BOX(&torch_pd::gated_act));
}
