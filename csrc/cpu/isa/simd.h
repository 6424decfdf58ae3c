// Vectors of floats for the instruction set that this source is compiled for. Everything is
// always inlined and lives in the namespace of the set (see ../isa.h for why).
#pragma once

#include <cstdint>
#if defined(__x86_64__)
// GCC's own headers leave don't-care operands uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#define TPD_INLINE static inline __attribute__((always_inline))

namespace torch_pd {
namespace TORCH_PD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VH __attribute__((vector_size(kLanes * 2)));

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <typename To, typename From>
TPD_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

TPD_INLINE VF splat(float x) { return x - VF{}; }
TPD_INLINE VI splat_int(int32_t x) { return x - VI{}; }

// a * b + c, rounded once where the set has it. Each lane is the same arithmetic, so a result does
// not depend on the lane or the tile that it is computed in.
TPD_INLINE VF fma(VF a, VF b, VF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

TPD_INLINE VF max(VF a, VF b) { return a > b ? a : b; }

// --- one element ---

TPD_INLINE float to_float(float x) { return x; }
TPD_INLINE float to_float(BF16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
TPD_INLINE float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Bits as a tiny float, times 2^112: also right for float16's subnormals.
  return bits_of<float>(sign | bits_of<uint32_t>(bits_of<float>(magnitude << 13) * 0x1p112f));
}

// --- load and store kLanes elements of any of the three types as float ---

TPD_INLINE VF load(const float* p) {
  VF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
TPD_INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof(v)); }

#if defined(__AVX512F__)
TPD_INLINE VF widen(__m256i bits, const BF16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
TPD_INLINE VF widen(__m256i bits, const F16*) { return _mm512_cvtph_ps(bits); }
TPD_INLINE __m256i narrow(VF v, const BF16*) {
  const VI bits = bits_of<VI>(v);
  const VI rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return _mm512_cvtepi32_epi16(bits_of<__m512i>(v != v ? splat_int(0x7fc0) : rounded));
}
TPD_INLINE __m256i narrow(VF v, const F16*) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

template <typename T>
TPD_INLINE VF load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
template <typename T>
TPD_INLINE void store(T* p, VF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
// The first n elements, zeros after them; nothing past them is touched.
TPD_INLINE VF load_n(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
template <typename T>
TPD_INLINE VF load_n(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p), p);
}
TPD_INLINE void store_n(float* p, VF v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
template <typename T>
TPD_INLINE void store_n(T* p, VF v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), narrow(v, p));
}
#else
TPD_INLINE VF widen(VH x, const BF16*) { return bits_of<VF>(__builtin_convertvector(x, VU) << 16); }
TPD_INLINE VH narrow(VF v, const BF16*) {
  const VU bits = bits_of<VU>(v);
  const VU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v != v ? VU{} + 0x7fc0 : rounded, VH);
}
#if defined(__F16C__)
TPD_INLINE VF widen(VH x, const F16*) { return _mm256_cvtph_ps(bits_of<__m128i>(x)); }
TPD_INLINE VH narrow(VF v, const F16*) {
  return bits_of<VH>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
TPD_INLINE VF widen(VH x, const F16*) {
  const VU bits = __builtin_convertvector(x, VU), size = bits & 0x7fff;
  const VU normal = (size << 13) + (size >= 0x7c00 ? VU{} + (224u << 23) : VU{} + (112u << 23));
  const VU tiny = bits_of<VU>(__builtin_convertvector(bits_of<VI>(size), VF) * 0x1p-24f);
  return bits_of<VF>((size < 0x400 ? tiny : normal) | ((bits & 0x8000) << 16));
}
TPD_INLINE VH narrow(VF v, const F16*) {
  const VU bits = bits_of<VU>(v), size = bits & 0x7fffffff;
  const VU normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const VU tiny = bits_of<VU>(bits_of<VF>(size) + 0.5f) - 0x3f000000;  // rounds at 2^-24
  VU half = size < (113u << 23) ? tiny : normal;
  half = size >= 0x477ff000 ? VU{} + 0x7c00 : half;  // 65520 and more
  half = size > 0x7f800000 ? VU{} + 0x7e00 : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), VH);
}
#endif

template <typename T>
TPD_INLINE VF load(const T* p) {
  VH bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return widen(bits, p);
}
template <typename T>
TPD_INLINE void store(T* p, VF v) {
  const VH bits = narrow(v, p);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
// The first n elements, zeros after them; nothing past them is touched.
template <typename T>
TPD_INLINE VF load_n(const T* p, int n) {
  T part[kLanes] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T>
TPD_INLINE void store_n(T* p, VF v, int n) {
  T part[kLanes];
  store(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}
#endif

// 2 * kLanes elements of 16 bits as they are, two to a lane; or the first n of them, then zeros.
TPD_INLINE VF load_words(const BF16* p) {
  VF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
TPD_INLINE VF load_words_n(const BF16* p, int n) {
  VF v = {};
  __builtin_memcpy(&v, p, n * sizeof(BF16));
  return v;
}

// --- across lanes ---

#if defined(__AVX512F__)
TPD_INLINE void transpose(VF (&v)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  __m512 u[16];  // u[4 i + j]: column 4 lane + j of rows 4 i .. 4 i + 3
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[j + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[j], u[j + 4], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0xdd);
    v[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    v[j + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    v[j + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    v[j + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}
#elif defined(__AVX2__)
TPD_INLINE void transpose(VF (&v)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
    v[j + 4] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
  }
}
#else
TPD_INLINE void transpose(VF (&v)[kLanes]) {
  float t[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) t[j][i] = v[i][j];
  }
  for (int i = 0; i < kLanes; ++i) v[i] = load(t[i]);
}
#endif

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
