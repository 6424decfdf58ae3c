#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace torch_pd {

namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBase;
}

std::string cpu_isa() { return isa_name(); }

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

const char* isa_name() {
  constexpr const char* names[] = {"base", "avx2", "avx512", "avx512bf16"};
  return names[static_cast<int>(isa())];
}

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&torch_pd::cpu_isa));
}
