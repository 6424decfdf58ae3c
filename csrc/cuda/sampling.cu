// sample: one token per row of logits. A block per row; top_k, top_p and min_p without a sort.
//
// Everything is said in distances d = peak - logit. A token weighs exp(-d / temperature) as an
// integer in units of 2^-40, so that sums have no order and a draw is the same in every run. A
// filter is a limit on d: found by a histogram over d, then over the bin that the limit falls into,
// until that holds one value; equal values are taken by rising token id. The draw inverts the
// cumulative weight in the order of token ids: no token needs a rank.
#include <torch/csrc/stable/library.h>

#include <cfloat>

#include "vec.cuh"

namespace torch_pd {

namespace {

constexpr int kThreads = 1024;
constexpr int kBins = kThreads;            // a thread scans one bin
constexpr int kMaxTiles = kThreads;        // and one tile
constexpr int kMaxLevels = 4;              // 1024^4 bins over the range are finer than float32
constexpr float kUnit = 1099511627776.0f;  // 2^40
constexpr float kGreedyBelow = 1e-5f;      // request.py

struct SampleArgs {
  const void* logits;
  int64_t* tokens;
  const double* settings;  // [n, 3]: temperature, top_p, min_p; null: all rows greedy
  const int64_t* keys;     // [n, 4]: top_k, seed, index, position
  int64_t stride;
  int vocab;
  int32_t* flag;
};

struct Shared {
  // Of a bin (or tile): tokens, and their weight in two words, since only 32-bit sums are native.
  uint32_t count[kBins], low[kBins], high[kBins];
  uint64_t warp[32];
  float smallest[32], largest[32];
  uint64_t best[32];
  int bin, token;
  uint64_t before;

  __device__ __forceinline__ void clear() {
    __syncthreads();
    count[threadIdx.x] = low[threadIdx.x] = high[threadIdx.x] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(int i, uint64_t weight) {
    const uint32_t part = static_cast<uint32_t>(weight), old = atomicAdd(&low[i], part);
    const uint32_t carry = static_cast<uint32_t>(weight >> 32) + (old + part < old);
    if (carry != 0) atomicAdd(&high[i], carry);
  }
  __device__ __forceinline__ uint64_t mass(int i) const {
    return static_cast<uint64_t>(high[i]) << 32 | low[i];
  }
};

// SplitMix64, as engine/draw.py.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Uniform in [0, 1) of (seed, index of the sequence, position).
__device__ __forceinline__ double uniform(const int64_t* key) {
  const uint64_t seed = key[1], index = key[2], position = key[3];
  return static_cast<double>(mix(mix(mix(seed) ^ index) ^ position) >> 11) * 0x1p-53;
}

// Exclusive sum over the block; `total` is the sum. Barriers before and after use of `warps`.
__device__ __forceinline__ uint64_t block_scan(uint64_t x, uint64_t* warps, uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  uint64_t base = 0;
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) base = total;
    total += warps[w];
  }
  return base + sum - x;
}

// A row in tiles of VEC tokens per thread. Its length is a multiple of VEC.
template <typename T, int VEC>
struct Row {
  const T* logits;
  int vocab;

  __device__ __forceinline__ int id_of(int tile) const {
    return (tile * kThreads + static_cast<int>(threadIdx.x)) * VEC;
  }
  // Calls f(tile, first token id, values) in every thread; an id past the row comes without values.
  template <int AHEAD, typename F>
  __device__ __forceinline__ void for_tiles(F&& f) const {
    const int tiles = (vocab + kThreads * VEC - 1) / (kThreads * VEC);
    for (int first = 0; first < tiles; first += AHEAD) {
      Vec<T, VEC> values[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (id_of(first + i) < vocab) values[i] = load_vec<VEC>(logits + id_of(first + i));
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (first + i < tiles) f(first + i, id_of(first + i), values[i]);
      }
    }
  }
  // Calls f(token id, logit) for every token.
  template <int AHEAD, typename F>
  __device__ __forceinline__ void for_each(F&& f) const {
    for_tiles<AHEAD>([&](int, int id, const Vec<T, VEC>& values) {
      if (id >= vocab) return;
#pragma unroll
      for (int e = 0; e < VEC; ++e) f(id + e, to_float(values.at[e]));
    });
  }
};

// How a row is drawn.
struct Draw {
  float peak, inverse_temperature, min_p;

  __device__ __forceinline__ uint64_t weight(float d) const {
    const float w = expf(-d * inverse_temperature);
    return w < min_p ? 0 : static_cast<uint64_t>(w * kUnit);
  }
};

// Tokens that a filter keeps: nearer than `near`, or up to `far` with an id of at most `last`.
struct Limit {
  float near, far;
  int last;
  __device__ __forceinline__ bool keeps(float d, int id) const {
    return d < near || (d <= far && id <= last);
  }
};
__device__ constexpr Limit kNoLimit{INFINITY, INFINITY, INT_MAX};

// The lowest token id at which the running sum of measure(id, logit), in the order of ids, passes
// target(whole sum). The same in every thread.
template <typename T, int VEC, typename Measure, typename Target>
__device__ int invert(const Row<T, VEC>& row, Shared& shared, Measure&& measure, Target&& target) {
  shared.clear();
  row.template for_tiles<2>([&](int tile, int id, const Vec<T, VEC>& values) {
    uint64_t sum = 0;
    if (id < row.vocab) {
#pragma unroll
      for (int e = 0; e < VEC; ++e) sum += measure(id + e, to_float(values.at[e]));
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0 && sum != 0) shared.add(tile, sum);
  });
  __syncthreads();
  uint64_t total = 0;
  const uint64_t here = shared.mass(threadIdx.x);
  const uint64_t before = block_scan(here, shared.warp, total);
  const uint64_t goal = target(total);
  if (before <= goal && goal < before + here) {
    shared.bin = static_cast<int>(threadIdx.x);
    shared.before = goal - before;
  }
  __syncthreads();
  const int id = row.id_of(shared.bin);
  const uint64_t rest = shared.before;
  uint64_t sum = 0, parts[VEC];
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    parts[e] = id < row.vocab ? measure(id + e, to_float(row.logits[id + e])) : 0;
    sum += parts[e];
  }
  uint64_t running = block_scan(sum, shared.warp, total);
  if (running <= rest && rest < running + sum) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      if (running <= rest && rest < running + parts[e]) shared.token = id + e;
      running += parts[e];
    }
  }
  __syncthreads();
  return shared.token;
}

__device__ __forceinline__ int bin_of(float d, float low, float scale) {
  return min(max(static_cast<int>((d - low) * scale), 0), kBins - 1);
}

// Smallest x and largest y of the block.
__device__ __forceinline__ void block_range(Shared& shared, float& x, float& y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 16; step > 0; step /= 2) {
    x = fminf(x, __shfl_xor_sync(0xffffffffu, x, step));
    y = fmaxf(y, __shfl_xor_sync(0xffffffffu, y, step));
  }
  __syncthreads();
  if (lane == 0) shared.smallest[warp] = x, shared.largest[warp] = y;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) {
    x = fminf(x, shared.smallest[w]);
    y = fmaxf(y, shared.largest[w]);
  }
}

// The limit within `outer` at which the number of tokens reaches k, or (k = 0) their weight reaches
// `share` of the whole. `range`: no token that weighs anything lies farther.
template <typename T, int VEC>
__device__ Limit find_limit(const Row<T, VEC>& row, Shared& shared, const Draw& draw,
                            const Limit& outer, float range, int64_t k, double share) {
  const bool by_count = k > 0;
  float low = 0.0f, scale = kBins / range;
  float near = 0.0f, far = range;  // of the tokens looked at
  float last_low = 0.0f, last_scale = 0.0f;
  int last_bin = -1;
  uint64_t above = 0, goal = 0;  // tokens or weight nearer than `near`; what is to be reached
  for (int level = 0;; ++level) {
    const auto looked_at = [&](float d) {
      return d >= near && d <= far && (last_bin < 0 || bin_of(d, last_low, last_scale) == last_bin);
    };
    shared.clear();
    float smallest = INFINITY, largest = -INFINITY;
    row.template for_each<2>([&](int id, float logit) {
      const float d = draw.peak - logit;
      if (!looked_at(d) || !outer.keeps(d, id)) return;
      const uint64_t weight = draw.weight(d);
      if (weight == 0) return;
      smallest = fminf(smallest, d);
      largest = fmaxf(largest, d);
      const int bin = bin_of(d, low, scale);
      atomicAdd(&shared.count[bin], 1u);
      shared.add(bin, weight);
    });
    block_range(shared, smallest, largest);
    const uint64_t count = shared.count[threadIdx.x];
    const uint64_t mass = shared.mass(threadIdx.x);
    uint64_t tokens = 0, whole = 0;
    const uint64_t before_count = block_scan(count, shared.warp, tokens);
    const uint64_t before_mass = block_scan(mass, shared.warp, whole);
    if (level == 0) {
      if (by_count) {
        if (tokens <= static_cast<uint64_t>(k)) return kNoLimit;
        goal = static_cast<uint64_t>(k);
      } else {
        goal = static_cast<uint64_t>(ceil(share * static_cast<double>(whole)));
        goal = min(max(goal, uint64_t{1}), whole);
      }
    }
    if (smallest == largest || level == kMaxLevels - 1) {
      const uint64_t each = by_count ? 1 : draw.weight(smallest);
      const uint64_t taken = (goal - above + each - 1) / each;
      if (taken >= tokens) return {smallest, largest, INT_MAX};
      const int last = invert(
          row, shared,
          [&](int id, float logit) -> uint64_t {
            const float d = draw.peak - logit;
            return d >= smallest && d <= largest && outer.keeps(d, id) && draw.weight(d) != 0;
          },
          [&](uint64_t) { return taken - 1; });
      return {smallest, largest, last};
    }
    const uint64_t before = above + (by_count ? before_count : before_mass);
    if (before < goal && goal <= before + (by_count ? count : mass)) {
      shared.bin = static_cast<int>(threadIdx.x);
      shared.before = before;
    }
    __syncthreads();
    last_bin = shared.bin, last_low = low, last_scale = scale;
    above = shared.before;
    near = smallest, far = largest;
    low += last_bin / scale;
    scale *= kBins;
  }
}

// Peak of a row, the lowest id that has it, and the smallest finite value; false if the row holds
// NaN or +infinity, or nothing else than -infinity.
template <typename T, int VEC>
__device__ bool find_peak(const Row<T, VEC>& row, Shared& shared, float& peak, int& token,
                          float& smallest) {
  float best = -INFINITY, least = INFINITY;
  int at = INT_MAX;
  bool bad = false;
  row.template for_each<4>([&](int id, float x) {
    bad = bad || !(x <= FLT_MAX);
    if (x > best) best = x, at = id;
    if (x >= -FLT_MAX) least = fminf(least, x);
  });
  peak = best;
  smallest = least;
  block_range(shared, smallest, peak);
  uint64_t id = best == peak ? static_cast<uint64_t>(at) : INT_MAX;
  for (int step = 16; step > 0; step /= 2) id = min(id, __shfl_xor_sync(0xffffffffu, id, step));
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = id;
  bad = __syncthreads_or(bad);
  for (int w = 0; w < kThreads / 32; ++w) id = min(id, shared.best[w]);
  token = static_cast<int>(id);
  return !bad && peak >= -FLT_MAX;
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const SampleArgs a) {
  __shared__ Shared shared;
  const Row<T, VEC> row{static_cast<const T*>(a.logits) + blockIdx.x * a.stride, a.vocab};
  float peak, smallest;
  int token;
  if (!find_peak(row, shared, peak, token, smallest)) {
    if (threadIdx.x == 0) {
      raise_flag(a.flag, kSample, kBadLogits, blockIdx.x);
      a.tokens[blockIdx.x] = -1;
    }
    return;
  }
  if (a.settings != nullptr) {
    const double* settings = a.settings + 3 * int64_t{blockIdx.x};
    const int64_t* key = a.keys + 4 * int64_t{blockIdx.x};
    const float temperature = static_cast<float>(settings[0]);
    const double top_p = settings[1];
    const int64_t k = key[0];
    if (temperature >= kGreedyBelow && k != 1) {
      // The peak weighs one, whatever the settings are: there is always a token to draw.
      const Draw draw{peak, 1.0f / temperature, fminf(static_cast<float>(settings[2]), 1.0f)};
      // exp(-28) is less than one unit.
      const float range = fmaxf(fminf(28.0f * temperature, peak - smallest), FLT_MIN * 0x1p30f);
      Limit by_k = kNoLimit, by_p = kNoLimit;
      if (k > 0 && k < a.vocab) by_k = find_limit(row, shared, draw, by_k, range, k, 0.0);
      if (top_p < 1.0) by_p = find_limit(row, shared, draw, by_k, range, 0, top_p);
      const double u = uniform(key);
      token = invert(
          row, shared,
          [&](int id, float logit) -> uint64_t {
            const float d = peak - logit;
            return by_k.keeps(d, id) && by_p.keeps(d, id) ? draw.weight(d) : 0;
          },
          [&](uint64_t whole) {
            return min(static_cast<uint64_t>(u * static_cast<double>(whole)), whole - 1);
          });
    }
  }
  if (threadIdx.x == 0) a.tokens[blockIdx.x] = token;
}

void sample(const Tensor& logits, const Tensor& tokens, const OptTensor& settings,
            const OptTensor& keys) {
  const char* op = "sample";
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  check_last_contiguous(op, "logits", logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_index(op, "tokens", tokens, ScalarType::Long, 1, "logits", logits);
  check_size(op, "tokens", tokens, 0, rows);
  check_output(op, "tokens", tokens);
  TPD_CHECK(op, settings.has_value() == keys.has_value(),
            "settings and keys must be given together");
  if (settings) {
    check_index(op, "settings", *settings, ScalarType::Double, 2, "logits", logits);
    check_index(op, "keys", *keys, ScalarType::Long, 2, "logits", logits);
    check_contiguous(op, "settings", *settings);
    check_contiguous(op, "keys", *keys);
    check_size(op, "settings", *settings, 0, rows);
    check_size(op, "settings", *settings, 1, 3);
    check_size(op, "keys", *keys, 0, rows);
    check_size(op, "keys", *keys, 1, 4);
  }
  constexpr int64_t kMaxVocab = int64_t{kThreads} * kMaxTiles;
  TPD_CHECK(op, vocab >= 1 && vocab <= kMaxVocab, "logits must have 1 to ", kMaxVocab,
            " columns, got ", vocab);
  TPD_CHECK(op, rows < (int64_t{1} << 31), rows, " rows, at most 2^31 - 1");
  if (rows == 0) return;
  const Launch launch(op, logits);
  const SampleArgs a{logits.data_ptr(),
                     static_cast<int64_t*>(tokens.data_ptr()),
                     settings ? static_cast<const double*>(settings->data_ptr()) : nullptr,
                     keys ? static_cast<const int64_t*>(keys->data_ptr()) : nullptr,
                     logits.stride(0),
                     static_cast<int>(vocab),
                     error_flag(op, launch.device)};
  dispatch_float(op, logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVec = 16 / sizeof(T);
    const auto blocks = static_cast<unsigned>(rows);
    if (aligned(a.logits, 16) && a.stride % kVec == 0 && vocab % kVec == 0) {
      sample_kernel<T, kVec><<<blocks, kThreads, 0, launch.stream>>>(a);
    } else {
      sample_kernel<T, 1><<<blocks, kThreads, 0, launch.stream>>>(a);
    }
  });
  launch.check();
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) { m.impl("sample", TORCH_BOX(&torch_pd::sample)); }
