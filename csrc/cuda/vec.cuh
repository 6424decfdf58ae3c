// Storage types, vector accesses, sums over a block and small host helpers of the elementwise
// kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common.cuh"
#include "ptx.cuh"

namespace torch_pd {

// Calls f with a null pointer of the storage type.
template <typename F>
inline void dispatch_float(const char* op, ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<__half*>(nullptr));
    default: fail(op, dtype_name(type), " is not supported on CUDA");
  }
}

// What a cache of ScalarType::Byte holds: bits 15 and 12 to 6 of a float16.
struct Float8 {
  uint8_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(Float8 x) {
  return __half2float(
      __ushort_as_half(static_cast<uint16_t>((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 6)));
}
__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
// Rounds to the nearest, ties away from zero; |x| at most kFloat8Max.
template <>
__device__ __forceinline__ Float8 from_float<Float8>(float x) {
  const uint32_t rounded = ptx::cut_to_halves(x, 0.0f) + 0x20;
  return {static_cast<uint8_t>((rounded >> 8 & 0x80) | (rounded >> 6 & 0x7f))};
}
template <>
__device__ __forceinline__ int8_t from_float<int8_t>(float x) {
  return static_cast<int8_t>(max(-127, min(127, __float2int_rn(x))));  // NaN becomes 0
}

// N elements that move as one access of up to 16 bytes (two for 32). Bytes are held as words: the
// compiler would take each load apart and wait for it before the next one.
template <typename T, int N, bool WORDS = sizeof(T) == 1 && N % 4 == 0>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T at[N];
};
template <typename T, int N>
struct alignas(N < 16 ? N : 16) Vec<T, N, true> {
  uint32_t words[N / 4];
};

template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_vec(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store_vec(T* to, const Vec<T, N>& value) {
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

// N float32 values rounded to T; 16-bit values are made two at a time, float8 values four.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> narrow(const float (&x)[N]) {
  Vec<T, N> out;
  if constexpr (std::is_same_v<T, int8_t> && N % 4 == 0) {
#pragma unroll
    for (int e = 0; e < N; e += 4) {
      uint32_t q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = static_cast<uint8_t>(from_float<int8_t>(x[e + i]));
      out.words[e / 4] =
          __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
    }
  } else if constexpr (std::is_same_v<T, Float8> && N % 4 == 0) {
#pragma unroll
    for (int e = 0; e < N; e += 4) {
      // Adding half a step of float8 to float16's bits rounds them; a carry goes into the exponent.
      uint32_t pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t h = ptx::cut_to_halves(x[e + 2 * i], x[e + 2 * i + 1]) + 0x00200020u;
        pair[i] = (h & 0x80008000u) | (h << 2 & 0x7f007f00u);
      }
      out.words[e / 4] = __byte_perm(pair[0], pair[1], 0x7531);
    }
  } else if constexpr (sizeof(T) != 2 || N % 2 != 0) {
#pragma unroll
    for (int e = 0; e < N; ++e) out.at[e] = from_float<T>(x[e]);
  } else {
#pragma unroll
    for (int e = 0; e < N; e += 2) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        *reinterpret_cast<__nv_bfloat162*>(&out.at[e]) = __floats2bfloat162_rn(x[e], x[e + 1]);
      } else {
        *reinterpret_cast<__half2*>(&out.at[e]) = __floats2half2_rn(x[e], x[e + 1]);
      }
    }
  }
  return out;
}

// N values as float32; bytes four at a time.
template <typename T, int N>
__device__ __forceinline__ void widen(const Vec<T, N>& in, float (&x)[N]) {
  if constexpr (sizeof(T) == 1 && N % 4 == 0) {
#pragma unroll
    for (int e = 0; e < N; e += 4) {
      const uint32_t word = in.words[e / 4];
      const ptx::Halves halves =
          std::is_same_v<T, Float8> ? ptx::float8_to_halves(word) : ptx::int8_to_halves(word);
      const float2 even = __half22float2(reinterpret_cast<const __half2&>(halves.even));
      const float2 odd = __half22float2(reinterpret_cast<const __half2&>(halves.odd));
      x[e] = even.x, x[e + 1] = odd.x, x[e + 2] = even.y, x[e + 3] = odd.y;
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = to_float(in.at[e]);
  }
}

// Makes the compiler hold 16-bit values as they came, not as the float32 it has already made of
// them.
template <typename T, int N>
__device__ __forceinline__ void keep_packed(Vec<T, N>& v) {
  uint32_t* words = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(v) / 4); ++i) asm volatile("" : "+r"(words[i]));
}

// Division by a number fixed for a launch (Granlund and Montgomery), for 0 <= x < 2^31.
struct FastDiv {
  uint32_t divisor, multiplier, shift;
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)), multiplier(0), shift(0) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ uint32_t div(uint32_t x) const {
    return (__umulhi(x, multiplier) + x) >> shift;
  }
};

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sums over groups of `lanes` (a power of two) neighbouring threads, interleaved.
template <int N>
__device__ __forceinline__ void group_sums(float (&x)[N], int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
  }
}

// Maxima likewise; a NaN stays.
template <int N>
__device__ __forceinline__ void group_maxima(float (&x)[N], int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = ptx::max_nan(x[i], __shfl_xor_sync(0xffffffffu, x[i], step));
  }
}

// Sum over the block, the same bits in every thread. `partial` has one float per warp; a second
// call needs a barrier in between.
__device__ __forceinline__ float block_sum(float x, float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

inline bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace torch_pd
