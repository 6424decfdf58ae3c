// One binary, several instruction sets. Sources in csrc/cpu/isa/ are compiled once per set with
// TORCH_PD_ISA = base | avx2 | avx512 | avx512bf16; each defines its functions in the namespace of
// that name. TPD_ISA declares such a function in every namespace and defines a pick at run time:
//
//   TPD_ISA(void, rms_norm_rows, (const RmsNorm& p, int64_t begin, int64_t end))
//   ... rms_norm_rows_fn()(p, 0, n);        // the best one for this CPU
//
// Rule: an isa/ source uses no inline function or template from outside its own namespace (std::
// containers, torch headers' helpers): the linker keeps one copy of such a function for the whole
// library, and it may be the AVX-512 one. Threads, checks and containers stay in csrc/cpu/*.cpp.
#pragma once

namespace torch_pd {

enum class Isa { kBase, kAvx2, kAvx512, kAvx512Bf16 };
Isa isa();  // detected once
const char* isa_name();

#if defined(__x86_64__)
#define TPD_ISA(ret, name, args)                       \
  namespace base {                                     \
  ret name args;                                       \
  }                                                    \
  namespace avx2 {                                     \
  ret name args;                                       \
  }                                                    \
  namespace avx512 {                                   \
  ret name args;                                       \
  }                                                    \
  namespace avx512bf16 {                               \
  ret name args;                                       \
  }                                                    \
  inline auto name##_fn() {                            \
    switch (isa()) {                                   \
      case Isa::kAvx512Bf16: return &avx512bf16::name; \
      case Isa::kAvx512: return &avx512::name;         \
      case Isa::kAvx2: return &avx2::name;             \
      default: return &base::name;                     \
    }                                                  \
  }
#else
#define TPD_ISA(ret, name, args) \
  namespace base {               \
  ret name args;                 \
  }                              \
  inline auto name##_fn() { return &base::name; }
#endif

}  // namespace torch_pd
