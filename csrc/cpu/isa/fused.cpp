// Row kernels of rope_write_kv, rms_norm, gated_act and of caches of bytes. Float32 inside, one
// rounding at the end; a row is computed from its own inputs alone, in one order.
#include "../fused.h"

#include "bytes.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

TPD_INLINE VF abs(VF x) { return bits_of<VF>(bits_of<VU>(x) & 0x7fffffff); }

// In halves, so that the order does not depend on the row's width.
TPD_INLINE float sum(VF x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  }
  return x[0];
}

// n <= kLanes elements, the lanes behind them 0.
template <typename T>
TPD_INLINE VF load(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_n(p, static_cast<int>(n));
}
template <typename T>
TPD_INLINE void store(T* p, VF x, int64_t n) {
  n == kLanes ? store(p, x) : store_n(p, x, static_cast<int>(n));
}

// The value that a store and a load leave.
TPD_INLINE VF round_to(VF x, const float*) { return x; }
template <typename T>
TPD_INLINE VF round_to(VF x, const T* like) {
  return widen(narrow(x, like), like);
}

namespace {

// Calls body(column, lanes) over a row, whole vectors first.
template <typename Body>
inline __attribute__((always_inline)) void for_columns(int64_t width, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) body(c, int64_t{kLanes});
  if (c < width) body(c, width - c);
}

template <typename T>
inline float sum_of_squares(const T* row, int64_t width) {
  VF total{};
  for_columns(width, [&](int64_t c, int64_t n) {
    const VF x = load(row + c, n);
    total += x * x;
  });
  return sum(total);
}

inline float inverse_rms(float squares, int64_t width, float eps) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);
}

template <typename T>
void rms_norm(const RmsNorm& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t t = begin; t < end; ++t) {
    const T* row = static_cast<const T*>(p.x) + t * p.x_token;
    T* out = static_cast<T*>(p.out) + t * p.out_token;
    float squares;
    if (p.residual) {
      T* residual = static_cast<T*>(p.residual) + t * p.residual_token;
      VF total{};
      for_columns(p.width, [&](int64_t c, int64_t n) {
        const VF x = load(residual + c, n) + p.scale * load(row + c, n);
        const VF rounded = round_to(x, residual);
        store(residual + c, rounded, n);
        total += rounded * rounded;
      });
      squares = sum(total);
      row = residual;
    } else {
      squares = sum_of_squares(row, p.width);
    }
    const float factor = inverse_rms(squares, p.width, p.eps);
    for_columns(p.width, [&](int64_t c, int64_t n) {
      store(out + c, load(row + c, n) * factor * (p.offset + load(weight + c, n)), n);
    });
  }
}

// e^-(a + b) for a >= 0 and a b that is at most a rounding error of a. Cephes' polynomial; the two
// halves of 2^n keep denormal results.
inline VF exp_minus(VF a, VF b) {
  a = a > 105.0f ? splat(105.0f) : a;                 // e^-105 is 0 in float32
  const VF shifted = a * -1.44269504f + 12582912.0f;  // the low bits are the rounded integer
  const VF n = shifted - 12582912.0f;
  const VF r = ((-a - n * 0.693359375f) - n * -2.12194440e-4f) - b;
  VF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const VF e = p * (r * r) + r + 1.0f;
  const VI exponent = bits_of<VI>(shifted) - 0x4b400000, half = exponent >> 1;
  return e * bits_of<VF>((half + 127) << 23) * bits_of<VF>((exponent - half + 127) << 23);
}

// high + low: exponents of e need more digits than a float32 has.
struct Pair {
  VF high, low;
};

// a * b exactly.
TPD_INLINE Pair product(VF a, VF b) {
  const VF high = a * b;
#if defined(__AVX2__)
  return {high, fma(a, b, -high)};
#else
  // Dekker: halves of 12 bits, whose products are exact.
  const VF a_shift = a * 4097.0f, b_shift = b * 4097.0f;
  const VF a_high = a_shift - (a_shift - a), b_high = b_shift - (b_shift - b);
  const VF a_low = a - a_high, b_low = b - b_high;
  return {high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low};
#endif
}

// a + b exactly (Knuth).
TPD_INLINE Pair exact_sum(VF a, VF b) {
  const VF high = a + b, part = high - a;
  return {high, (a - (high - part)) + (b - part)};
}

// x * sigmoid(y) for |y| = a + b with the sign of x.
inline VF times_sigmoid(VF x, VF a, VF b) {
  const VF e = exp_minus(a, b);
  return (x < 0.0f ? x * e : x) / (1.0f + e);
}

template <Activation kind>
inline VF activate(VF x) {
  if constexpr (kind == Activation::kSilu) {
    return times_sigmoid(x, abs(x), VF{});
  } else if constexpr (kind == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u), 2 u = z (c + d z^2), c = sqrt(8 / pi), d = 0.044715 c
    VF z = abs(x);
    z = z > 16.0f ? splat(16.0f) : z;  // sigmoid is 0 or 1 there
    const Pair square = product(z, z), dz = product(square.high, splat(0.0713548139f));
    const Pair factor = exact_sum(splat(1.59576917f), dz.high);
    const VF rest =
        dz.low + square.low * 0.0713548139f + square.high * 2.39883247e-09f + -4.53406805e-08f;
    const Pair y = product(z, factor.high);
    return times_sigmoid(x, y.high, y.low + z * (factor.low + rest));
  } else {
    // x Phi(x); Phi(-z) = e^(-z^2 / 2) f(t) / (z + 4), t = (z - 4) / (z + 4): minimax fit of f to
    // z = 14.5, relative error 6e-8. Behind that Phi(-z) z is 0 in float32.
    VF z = abs(x);
    z = z > 14.5f ? splat(14.5f) : z;
    const Pair square = product(z, z);
    const VF r = 1.0f / (z + 4.0f), t = (z - 4.0f) * r;
    VF f = splat(-1.319728383e-04f);
    f = f * t + 1.793522928e-04f;
    f = f * t + 1.569923309e-03f;
    f = f * t + -3.512552671e-03f;
    f = f * t + -7.525270960e-03f;
    f = f * t + 6.040383080e-02f;
    f = f * t + -1.865234415e-01f;
    f = f * t + 3.871369011e-01f;
    f = f * t + -6.078965883e-01f;
    f = f * t + 7.552851354e-01f;
    const VF tail = exp_minus(0.5f * square.high, 0.5f * square.low) * (f * r);
    return x * (x < 0.0f ? tail : 1.0f - tail);
  }
}

template <typename T, Activation kind>
void gated_act(const GatedAct& p, const int64_t* widths, int64_t shards, int64_t begin,
               int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(p.x) + t * p.x_token;
    T* out = static_cast<T*>(p.out) + t * p.out_token;
    for (int64_t s = 0; s < shards; ++s) {
      const T* up = gate + widths[s];
      for_columns(widths[s], [&](int64_t c, int64_t n) {
        store(out + c, activate<kind>(load(gate + c, n)) * load(up + c, n), n);
      });
      gate += 2 * widths[s];
      out += widths[s];
    }
  }
}

template <typename T>
void gated_act_of(const GatedAct& p, const int64_t* widths, int64_t shards, int64_t begin,
                  int64_t end) {
  switch (p.activation) {
    case Activation::kSilu: return gated_act<T, Activation::kSilu>(p, widths, shards, begin, end);
    case Activation::kGelu: return gated_act<T, Activation::kGelu>(p, widths, shards, begin, end);
    case Activation::kGeluTanh:
      return gated_act<T, Activation::kGeluTanh>(p, widths, shards, begin, end);
  }
}

// One head into a cache of bytes. scale = amax / largest value; 1 if that is not a normal number
// (all is stored as 0), NaN if the head holds a NaN or an infinity: then all of it reads as NaN.
template <typename T>
void write_bytes(const T* from, int64_t width, bool int8, uint8_t* to, float* scale) {
  VI most{};  // of the magnitudes' bits: unlike comparisons of floats that keeps a NaN
  for_columns(width, [&](int64_t c, int64_t n) {
    const VI size = bits_of<VI>(load(from + c, n)) & 0x7fffffff;
    most = size > most ? size : most;
  });
  int32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = most[i] > top ? most[i] : top;
  const float made = bits_of<float>(top) / (int8 ? kInt8Max : kFloat8Max);
  *scale = made < 0x1p-126f ? 1.0f : made;
  const VF inverse = splat(1.0f / *scale);
  for_columns(width, [&](int64_t c, int64_t n) {
    const VB bytes = narrow_bytes(load(from + c, n) * inverse, int8);
    __builtin_memcpy(to + c, &bytes, n);
  });
}

// Where K and V of one slot lie.
struct Slot {
  char *k, *v;
  float *k_scale, *v_scale;  // null unless bytes
};

inline Slot find_slot(const KVCache& cache, int64_t slot, int64_t item) {
  const int64_t page = slot / cache.block_size, token = slot % cache.block_size;
  return {static_cast<char*>(cache.k) + (page * cache.k_page + token * cache.k_token) * item,
          static_cast<char*>(cache.v) + (page * cache.v_page + token * cache.v_token) * item,
          cache.k_scale ? cache.k_scale + page * cache.ks_page + token * cache.ks_token : nullptr,
          cache.v_scale ? cache.v_scale + page * cache.vs_page + token * cache.vs_token : nullptr};
}

template <typename T>
void write_byte_rows_of(const WriteKV& p, int64_t begin, int64_t end) {
  const KVCache& cache = p.cache;
  const bool int8 = cache.dtype == ScalarType::Char;
  for (int64_t t = begin; t < end; ++t) {
    if (p.slots[t] < 0) continue;
    const Slot slot = find_slot(cache, p.slots[t], 1);
    for (int64_t h = 0; h < cache.num_kv_heads; ++h) {
      write_bytes(static_cast<const T*>(p.k) + t * p.k_token + h * p.k_head, cache.k_dim, int8,
                  reinterpret_cast<uint8_t*>(slot.k) + h * cache.k_head, slot.k_scale + h);
      write_bytes(static_cast<const T*>(p.v) + t * p.v_token + h * p.v_head, cache.v_dim, int8,
                  reinterpret_cast<uint8_t*>(slot.v) + h * cache.v_head, slot.v_scale + h);
    }
  }
}

template <typename T>
void read_bytes_of(const uint8_t* from, bool int8, float scale, T* to, int64_t count) {
  for_columns(count, [&](int64_t c, int64_t n) {
    VB bytes{};
    __builtin_memcpy(&bytes, from + c, n);
    store(to + c, widen_bytes(bytes, int8) * scale, n);
  });
}

template <typename T>
void copy_floats(const void* from, float* to, int64_t width) {
  for_columns(width, [&](int64_t c, int64_t n) {
    store(to + c, load(static_cast<const T*>(from) + c, n), n);
  });
}

// One head of q or k: norm (weight null: none), rotation of the first rope_dim values.
template <typename T>
void norm_and_rotate(const RopeWriteKV& p, const T* from, const T* weight, float factor,
                     const float* cos, const float* sin, float* head) {
  if (weight) {
    for_columns(p.head_dim, [&](int64_t c, int64_t n) {
      store(head + c, load(from + c, n) * factor * (p.norm_offset + load(weight + c, n)), n);
    });
  } else {
    copy_floats<T>(from, head, p.head_dim);
  }
  const int64_t half = p.rope_dim / 2;
  for_columns(half, [&](int64_t c, int64_t n) {
    const VF a = load(head + c, n), b = load(head + half + c, n);
    store(head + c, a * load(cos + c, n) - b * load(sin + c, n), n);
    store(head + half + c, b * load(cos + half + c, n) + a * load(sin + half + c, n), n);
  });
}

template <typename T>
void rope_write_kv_rows_of(const RopeWriteKV& p, const int64_t* shard_heads, int64_t shards,
                           float* scratch, int64_t begin, int64_t end) {
  const KVCache& cache = p.cache;
  const int64_t dim = p.head_dim, group = p.num_heads / cache.num_kv_heads;
  const int64_t item = cache.k_scale ? 1 : sizeof(T);
  const T *q_norm = static_cast<const T*>(p.q_norm), *k_norm = static_cast<const T*>(p.k_norm);
  float *cos = scratch, *sin = cos + p.rope_dim, *head = sin + p.rope_dim;
  // The first column of a shard that `kv_before` KV heads lie before.
  const T* const qkv = static_cast<const T*>(p.qkv);
  const auto columns = [&](int64_t t, int64_t kv_before, int64_t kv) {
    const int64_t span = (group + 2) * dim;  // columns of a KV head
    return p.blocked ? qkv + (p.num_tokens * kv_before + t * kv) * span
                     : qkv + t * p.qkv_token + kv_before * span;
  };
  for (int64_t t = begin; t < end; ++t) {
    T* q = static_cast<T*>(p.q) + t * p.q_token;
    const bool write = p.slots[t] >= 0;
    const Slot slot = write ? find_slot(cache, p.slots[t], item) : Slot{};
    if (p.rope_dim && p.rope_float) {
      copy_floats<float>(static_cast<const float*>(p.cos) + t * p.cos_token, cos, p.rope_dim);
      copy_floats<float>(static_cast<const float*>(p.sin) + t * p.sin_token, sin, p.rope_dim);
    } else if (p.rope_dim) {
      copy_floats<T>(static_cast<const T*>(p.cos) + t * p.cos_token, cos, p.rope_dim);
      copy_floats<T>(static_cast<const T*>(p.sin) + t * p.sin_token, sin, p.rope_dim);
    }
    float q_factor = 1, k_factor = 1;
    if (p.norm_whole) {  // over the heads of all shards, before any of them is scaled
      float q_squares = 0, k_squares = 0;
      int64_t kv_before = 0;
      for (int64_t s = 0; s < shards; ++s) {
        const int64_t kv = shard_heads[s] * dim;
        const T* block = columns(t, kv_before, shard_heads[s]);
        q_squares += sum_of_squares(block, kv * group);
        k_squares += sum_of_squares(block + kv * group, kv);
        kv_before += shard_heads[s];
      }
      q_factor = inverse_rms(q_squares, p.num_heads * dim, p.eps);
      k_factor = inverse_rms(k_squares, cache.num_kv_heads * dim, p.eps);
    }
    const auto finish = [&](const T* from, const T* norm, int64_t h, float factor) {
      const T* weight = norm && p.norm_whole ? norm + h * dim : norm;
      if (norm && !p.norm_whole) factor = inverse_rms(sum_of_squares(from, dim), dim, p.eps);
      norm_and_rotate(p, from, weight, factor, cos, sin, head);
    };
    int64_t q_head = 0, kv_before = 0;
    for (int64_t s = 0; s < shards; ++s) {
      const T* row = columns(t, kv_before, shard_heads[s]);
      for (int64_t i = 0; i < shard_heads[s] * group; ++i, ++q_head, row += dim) {
        finish(row, q_norm, q_head, q_factor);
        for_columns(dim, [&](int64_t c, int64_t n) {
          store(q + q_head * p.q_head + c, load(head + c, n), n);
        });
      }
      const T *k = row, *v = k + shard_heads[s] * dim;
      int64_t kv_head = kv_before;
      kv_before += shard_heads[s];
      for (; write && kv_head < kv_before; ++kv_head, k += dim, v += dim) {
        finish(k, k_norm, kv_head, k_factor);
        char* k_out = slot.k + kv_head * cache.k_head * item;
        char* v_out = slot.v + kv_head * cache.v_head * item;
        if (cache.k_scale) {
          const bool int8 = cache.dtype == ScalarType::Char;
          write_bytes(head, dim, int8, reinterpret_cast<uint8_t*>(k_out), slot.k_scale + kv_head);
          write_bytes(v, dim, int8, reinterpret_cast<uint8_t*>(v_out), slot.v_scale + kv_head);
        } else {
          for_columns(dim, [&](int64_t c, int64_t n) {
            store(reinterpret_cast<T*>(k_out) + c, load(head + c, n), n);
          });
          __builtin_memcpy(v_out, v, dim * sizeof(T));
        }
      }
    }
  }
}

}  // namespace

void rms_norm_rows(const RmsNorm& p, int64_t begin, int64_t end) {
  if (p.dtype == ScalarType::Float) return rms_norm<float>(p, begin, end);
  if (p.dtype == ScalarType::BFloat16) return rms_norm<BF16>(p, begin, end);
  return rms_norm<F16>(p, begin, end);
}

void gated_act_rows(const GatedAct& p, const int64_t* widths, int64_t shards, int64_t begin,
                    int64_t end) {
  if (p.dtype == ScalarType::Float) return gated_act_of<float>(p, widths, shards, begin, end);
  if (p.dtype == ScalarType::BFloat16) return gated_act_of<BF16>(p, widths, shards, begin, end);
  return gated_act_of<F16>(p, widths, shards, begin, end);
}

void rope_write_kv_rows(const RopeWriteKV& p, const int64_t* heads, int64_t shards, float* scratch,
                        int64_t begin, int64_t end) {
  if (p.dtype == ScalarType::Float) {
    return rope_write_kv_rows_of<float>(p, heads, shards, scratch, begin, end);
  }
  if (p.dtype == ScalarType::BFloat16) {
    return rope_write_kv_rows_of<BF16>(p, heads, shards, scratch, begin, end);
  }
  return rope_write_kv_rows_of<F16>(p, heads, shards, scratch, begin, end);
}

void write_byte_rows(const WriteKV& p, int64_t begin, int64_t end) {
  if (p.dtype == ScalarType::Float) return write_byte_rows_of<float>(p, begin, end);
  if (p.dtype == ScalarType::BFloat16) return write_byte_rows_of<BF16>(p, begin, end);
  return write_byte_rows_of<F16>(p, begin, end);
}

void read_bytes(const void* from, ScalarType stored, float scale, void* to, ScalarType dtype,
                int64_t count) {
  const bool int8 = stored == ScalarType::Char;
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  if (dtype == ScalarType::Float) {
    return read_bytes_of(bytes, int8, scale, static_cast<float*>(to), count);
  }
  if (dtype == ScalarType::BFloat16) {
    return read_bytes_of(bytes, int8, scale, static_cast<BF16*>(to), count);
  }
  return read_bytes_of(bytes, int8, scale, static_cast<F16*>(to), count);
}

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
