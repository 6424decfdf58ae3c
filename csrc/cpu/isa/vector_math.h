// exp, tanh and sums across the lanes of a vector.
#pragma once

#include "simd.h"

namespace torch_pd {
namespace TORCH_PD_ISA {

// exp(x) for x <= 88; 0 below -87.3; 1 for 0 exactly; NaN stays NaN. About 1 ulp.
TPD_INLINE VF exp(VF x) {
  const VF shifted = fma(x, splat(1.44269504f), splat(0x1.8p23f));  // integer in the low bits
  const VF n = shifted - 0x1.8p23f;
  VF r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  VF p = splat(1.9875691500e-4f);  // Cephes expf
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const VF power = bits_of<VF>((bits_of<VI>(shifted) << 23) + (127 << 23));
  return x < -87.3f ? VF{} : p * power;
}

TPD_INLINE VF tanh(VF x) {
  const VF size = x < 0.0f ? -x : x;
  const VF big = size > 20.0f ? splat(20.0f) : size;  // keeps NaN
  const VF far = 1.0f - 2.0f / (exp(big + big) + 1.0f);
  const VF z = x * x;
  VF p = splat(-5.70498872745e-3f);  // Cephes tanhf
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const VF near = fma(p * z, x, x);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

TPD_INLINE float max_lane(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

TPD_INLINE float add_lanes(VF v) {
  float s = v[0];
  for (int i = 1; i < kLanes; ++i) s += v[i];
  return s;
}

TPD_INLINE float exp_one(float x) { return exp(splat(x))[0]; }

}  // namespace TORCH_PD_ISA
}  // namespace torch_pd
