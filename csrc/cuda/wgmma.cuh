// Warpgroup matrix instructions of sm_90a: D [64, N] += A [64, 16] B [16, N], float32 sums. Issued
// by the four warps of a warpgroup together; asynchronous until wgmma_wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace torch_pd::ptx {

// A matrix in shared memory, 128-byte swizzled, rows of 128 bytes, groups of 8 rows 1024 bytes
// apart, at an address aligned to 1024 (plus 32 per step of 16 columns if it is read along its
// rows). `stride`: bytes from one block of 64 columns to the next, used only when B is read across
// its rows (transposed).
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(stride >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 |
         static_cast<uint64_t>(1) << 62;
}

// Orders this thread's accesses to registers and shared memory before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most N groups are in flight.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of accumulators across the asynchronous part.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define TPD_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TPD_D16(i) TPD_D4(i), TPD_D4(i + 4), TPD_D4(i + 8), TPD_D4(i + 12)
#define TPD_D32(i) TPD_D16(i), TPD_D16(i + 16)
#define TPD_D64(i) TPD_D32(i), TPD_D32(i + 32)
#define TPD_D128(i) TPD_D64(i), TPD_D64(i + 64)

#define TPD_NAMES32                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TPD_NAMES64                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TPD_NAMES128                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// A and B from shared memory, both along their rows. accumulate false: D is overwritten.
#define TPD_WGMMA_SS(N, R, TYPE) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" TPD_STR(TPD_ARG0_##R) ", 0;\n"                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TPD_NAMES##R    \
               "}, %" TPD_STR(TPD_ARG1_##R) ", %" TPD_STR(TPD_ARG2_##R) ", p, 1, 1, 0, 0;\n}\n"     \
               : TPD_D##R(0)                                                                      \
               : "r"(static_cast<int>(accumulate)), "l"(a), "l"(b))
// A from registers, B from shared memory across its rows; D is added to.
#define TPD_WGMMA_RS(N, R, TYPE) \
  asm volatile(                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TPD_NAMES##R        \
      "}, {%" TPD_STR(TPD_ARG0_##R) ", %" TPD_STR(TPD_ARG1_##R) ", %" TPD_STR(                 \
          TPD_ARG2_##R) ", %" TPD_STR(TPD_ARG3_##R) "}, %" TPD_STR(TPD_ARG4_##R) ", p, 1, 1, " \
                                                                                 "1;\n}\n"     \
      : TPD_D##R(0)                                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TPD_STR(x) TPD_STR2(x)
#define TPD_STR2(x) #x
#define TPD_ARG0_32 32
#define TPD_ARG1_32 33
#define TPD_ARG2_32 34
#define TPD_ARG3_32 35
#define TPD_ARG4_32 36
#define TPD_ARG0_64 64
#define TPD_ARG1_64 65
#define TPD_ARG2_64 66
#define TPD_ARG3_64 67
#define TPD_ARG4_64 68
#define TPD_ARG0_128 128
#define TPD_ARG1_128 129
#define TPD_ARG2_128 130
#define TPD_ARG3_128 131
#define TPD_ARG4_128 132

template <typename T, int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b,
                                         bool accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 64) {
    if constexpr (kHalf) {
      TPD_WGMMA_SS(64, 32, "f16");
    } else {
      TPD_WGMMA_SS(64, 32, "bf16");
    }
  } else {
    static_assert(N == 128);
    if constexpr (kHalf) {
      TPD_WGMMA_SS(128, 64, "f16");
    } else {
      TPD_WGMMA_SS(128, 64, "bf16");
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 64) {
    if constexpr (kHalf) {
      TPD_WGMMA_RS(64, 32, "f16");
    } else {
      TPD_WGMMA_RS(64, 32, "bf16");
    }
  } else if constexpr (N == 128) {
    if constexpr (kHalf) {
      TPD_WGMMA_RS(128, 64, "f16");
    } else {
      TPD_WGMMA_RS(128, 64, "bf16");
    }
  } else {
    static_assert(N == 256);
    if constexpr (kHalf) {
      TPD_WGMMA_RS(256, 128, "f16");
    } else {
      TPD_WGMMA_RS(256, 128, "bf16");
    }
  }
}

}  // namespace torch_pd::ptx
