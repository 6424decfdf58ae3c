// What caches of one byte a value hold, times a scale of each head: int8 from -127 to 127, or
// float8, which is bits 15 and 12 to 6 of a float16 whose other bits are 0: a sign, three bits of
// exponent and four of mantissa, subnormals in steps of 2^-18, no infinity and no NaN.
#pragma once

#include "simd.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

typedef uint8_t VB __attribute__((vector_size(kLanes)));

TPD_INLINE VF widen_float8(VB x) {
  const VU bits = __builtin_convertvector(x, VU), size = bits & 0x7f;
  const VU normal = (size << 19) + (112u << 23);
  const VU tiny = bits_of<VU>(__builtin_convertvector(bits_of<VI>(size), VF) * 0x1p-18f);
  return bits_of<VF>((size < 16 ? tiny : normal) | ((bits & 0x80) << 24));
}

// Rounds to the nearest, ties away from zero (the cheapest on a GPU), saturating; a NaN becomes 0.
TPD_INLINE VB narrow_float8(VF x) {
  const VU bits = bits_of<VU>(x), size = bits & 0x7fffffff;
  const VU normal = (size - (112u << 23) + (1u << 18)) >> 19;
  // Twice the number of steps, cut to an integer, still tells which step is the nearest.
  const VF small = bits_of<VF>(size < (113u << 23) ? size : VU{});
  const VU tiny = (bits_of<VU>(__builtin_convertvector(small * 0x1p19f, VI)) + 1) >> 1;
  VU out = size < (113u << 23) ? tiny : normal;
  out = out > 0x7f ? VU{} + 0x7f : out;
  out = size > 0x7f800000 ? VU{} : out;
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

TPD_INLINE VF widen_bytes(VB x, bool int8) { return int8 ? widen_int8(x) : widen_float8(x); }
TPD_INLINE VB narrow_bytes(VF x, bool int8) { return int8 ? narrow_int8(x) : narrow_float8(x); }

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
