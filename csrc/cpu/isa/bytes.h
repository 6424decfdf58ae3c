// What caches of one byte a value hold, times a scale of each head: int8 from -127 to 127, or
// float8_e4m3fn (no infinity, NaN 0x7f, largest 448, subnormals in steps of 2^-9).
#pragma once

#include "simd.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

typedef uint8_t VB __attribute__((vector_size(kLanes)));

TPD_INLINE VF widen_e4m3(VB x) {
  const VU bits = __builtin_convertvector(x, VU), size = bits & 0x7f;
  const VU normal = (size << 20) + (120u << 23);
  const VU tiny = bits_of<VU>(__builtin_convertvector(bits_of<VI>(size), VF) * 0x1p-9f);
  VU out = size < 8 ? tiny : normal;
  out = size == 0x7f ? VU{} + 0x7fc00000 : out;
  return bits_of<VF>(out | ((bits & 0x80) << 24));
}

// Round to nearest even, saturating at 448; a NaN stays a NaN.
TPD_INLINE VB narrow_e4m3(VF x) {
  const VU bits = bits_of<VU>(x), size = bits & 0x7fffffff;
  const VU normal = (size - (120u << 23) + 0x7ffff + ((size >> 20) & 1)) >> 20;
  // Adding 2^14 rounds at 2^-9 and leaves the count of such steps in the low bits.
  const VU tiny = bits_of<VU>(bits_of<VF>(size) + 0x1p14f) - (141u << 23);
  VU out = size < (121u << 23) ? tiny : normal;
  out = size > 0x43e00000 ? VU{} + 0x7e : out;
  out = size > 0x7f800000 ? VU{} + 0x7f : out;
  return __builtin_convertvector(out | ((bits >> 24) & 0x80), VB);
}

TPD_INLINE VF widen_int8(VB x) {
  const VI bits = bits_of<VI>(__builtin_convertvector(x, VU));
  return __builtin_convertvector((bits ^ 0x80) - 0x80, VF);
}

// Round to nearest even, saturating at 127; a NaN becomes 0.
TPD_INLINE VB narrow_int8(VF x) {
  x = x > 127.0f ? splat(127.0f) : x;
  x = x < -127.0f ? splat(-127.0f) : x;
  // Adding 1.5 * 2^23 rounds to integers and leaves them in the low bits.
  const VU bits = bits_of<VU>(x + 0x1.8p23f);
  return __builtin_convertvector(x == x ? bits & 0xff : VU{}, VB);
}

TPD_INLINE VF widen_bytes(VB x, bool int8) { return int8 ? widen_int8(x) : widen_e4m3(x); }
TPD_INLINE VB narrow_bytes(VF x, bool int8) { return int8 ? narrow_int8(x) : narrow_e4m3(x); }

// The largest value that is stored.
TPD_INLINE float largest_byte(bool int8) { return int8 ? 127.0f : 448.0f; }

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
