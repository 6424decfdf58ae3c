// Vectors of float32 and their storage formats, for the sources in csrc/cpu/isa. GCC vector
// extensions: one source for every instruction set. Everything has internal linkage (isa.h, Rule).
#pragma once

#include <stdint.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace torch_pd {
namespace TORCH_PD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));

// Storage types: distinct names for what are bits to us.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline Floats splat(float x) { return Floats{} + x; }
inline Words splat_bits(uint32_t x) { return Words{} + x; }

inline Floats widen(Floats x, const float*) { return x; }

inline Floats widen(Halves x, const BF16*) {
  return bit_cast<Floats>(__builtin_convertvector(x, Words) << 16);
}

inline Floats widen(Halves x, const F16*) {
#if defined(__AVX512F__)
  // The zero-masked form: GCC 12 warns inside the plain one (PR 105593).
  return bit_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(x)));
#elif defined(__F16C__)
  return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(x)));
#else
  const Words bits = __builtin_convertvector(x, Words), magnitude = bits & 0x7fff;
  const Words normal =
      (magnitude << 13) + (magnitude >= 0x7c00 ? splat_bits(224u << 23) : splat_bits(112u << 23));
  const Words tiny =
      bit_cast<Words>(__builtin_convertvector(bit_cast<Ints>(magnitude), Floats) * 0x1p-24f);
  return bit_cast<Floats>((magnitude < 0x400 ? tiny : normal) | ((bits & 0x8000) << 16));
#endif
}

inline Floats narrow(Floats x, const float*) { return x; }

// Round to nearest even; a NaN stays a NaN. (vcvtneps2bf16 would flush denormals.)
inline Halves narrow(Floats x, const BF16*) {
  const Words bits = bit_cast<Words>(x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Halves);
}

inline Halves narrow(Floats x, const F16*) {
#if defined(__AVX512F__)
  return bit_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x),
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<Halves>(
      _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words bits = bit_cast<Words>(x), magnitude = bits & 0x7fffffff;
  const Words odd = (magnitude >> 13) & 1;
  const Words normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
  // Adding 0.5 leaves units of 2^-24, the step of float16 denormals, in the low bits.
  const Words tiny = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
  Words half = magnitude < (113u << 23) ? tiny : normal;
  half = magnitude >= 0x477ff000 ? splat_bits(0x7c00) : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000 ? splat_bits(0x7e00) : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Halves);
#endif
}

// float8_e4m3fn: no infinity, NaN 0x7f, largest 448.
inline Floats widen_e4m3(Bytes x) {
  const Words bits = __builtin_convertvector(x, Words), magnitude = bits & 0x7f;
  const Words normal = (magnitude << 20) + (120u << 23);
  const Words tiny =
      bit_cast<Words>(__builtin_convertvector(bit_cast<Ints>(magnitude), Floats) * 0x1p-9f);
  Words out = magnitude < 8 ? tiny : normal;
  out = magnitude == 0x7f ? splat_bits(0x7fc00000) : out;
  return bit_cast<Floats>(out | ((bits & 0x80) << 24));
}

// Round to nearest even, saturating at 448; a NaN stays a NaN.
inline Bytes narrow_e4m3(Floats x) {
  const Words bits = bit_cast<Words>(x), magnitude = bits & 0x7fffffff;
  const Words odd = (magnitude >> 20) & 1;
  const Words normal = (magnitude - (120u << 23) + 0x7ffff + odd) >> 20;
  // Adding 2^14 leaves units of 2^-9, the step of e4m3 denormals, in the low bits.
  const Words tiny = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0x1p14f) - (141u << 23);
  Words out = magnitude < (121u << 23) ? tiny : normal;
  out = magnitude > 0x43e00000 ? splat_bits(0x7e) : out;
  out = magnitude > 0x7f800000 ? splat_bits(0x7f) : out;
  return __builtin_convertvector(out | ((bits >> 24) & 0x80), Bytes);
}

// The vector of raw storage elements of T.
template <typename T>
struct Raw {
  typedef Halves type;
};
template <>
struct Raw<float> {
  typedef Floats type;
};

// n <= kLanes elements; the lanes behind them are 0.
template <typename T>
inline Floats load(const T* from, int64_t n = kLanes) {
  typename Raw<T>::type raw{};
  if (__builtin_expect(n == kLanes, 1)) {
    __builtin_memcpy(&raw, from, sizeof(raw));
  } else {
    __builtin_memcpy(&raw, from, n * sizeof(T));
  }
  return widen(raw, from);
}

template <typename T>
inline void store(T* to, Floats x, int64_t n = kLanes) {
  const typename Raw<T>::type raw = narrow(x, to);
  if (__builtin_expect(n == kLanes, 1)) {
    __builtin_memcpy(to, &raw, sizeof(raw));
  } else {
    __builtin_memcpy(to, &raw, n * sizeof(T));
  }
}

// The value that a store and a load leave.
template <typename T>
inline Floats round_to(Floats x, const T* like) {
  return widen(narrow(x, like), like);
}

inline float sum(Floats x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  }
  return x[0];
}

inline float max(Floats x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
  }
  return x[0];
}

inline Floats abs(Floats x) { return bit_cast<Floats>(bit_cast<Words>(x) & 0x7fffffff); }

}  // namespace
}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
