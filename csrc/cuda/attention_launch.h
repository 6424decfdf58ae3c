// Host side of the attention kernels: what attention.cu hands to each family's launcher.
#pragma once

#include <atomic>
#include <type_traits>

#include "attention.cuh"

namespace torch_pd {

struct AttentionCall {
  const Launch& launch;
  const Tensor& like;  // workspaces are allocated where it lies
  AttentionArgs args;
  int head_dim;  // of K; V is as wide except in the plain kernel
  int v_dim;
  ScalarType dtype;
  Stored stored;
};

// Each takes the sequences whose packed rows are min_rows < rows <= max_rows.
void launch_decode(AttentionCall call, int max_rows);
void launch_decode_tall(const AttentionCall& call, int max_rows);  // for launch_decode alone
void launch_prefill(AttentionCall call, int min_rows);
void launch_prefill_sm90(AttentionCall call, int min_rows);
void launch_prefill_sm90_bytes(const AttentionCall& call);  // for launch_prefill_sm90 alone
bool fits_sm90(const AttentionCall& call);
void launch_plain(AttentionCall call);

struct PrefillArgs;
// Makes the list of work of p.tile_rows rows each on the device; the tensor holds it.
Tensor plan_prefill(const AttentionCall& call, PrefillArgs& p);

constexpr bool has_kernel(int64_t head_dim) {
  return head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

// Calls f(T{}, std::integral_constant<int, head_dim>{}) for the dtypes and widths of the
// tensor-core kernels.
template <typename F>
void dispatch_attention(const AttentionCall& call, const F& f) {
  const auto with_width = [&](auto zero) {
    switch (call.head_dim) {
      case 64: return f(zero, std::integral_constant<int, 64>{});
      case 80: return f(zero, std::integral_constant<int, 80>{});
      case 96: return f(zero, std::integral_constant<int, 96>{});
      case 128: return f(zero, std::integral_constant<int, 128>{});
      case 256: return f(zero, std::integral_constant<int, 256>{});
      default: fail(call.launch.op, "no kernel for head_dim ", call.head_dim);
    }
  };
  if (call.dtype == ScalarType::BFloat16) {
    with_width(__nv_bfloat16{});
  } else {
    with_width(__half{});
  }
}

// Raises the kernel's limit of dynamic shared memory, once per device.
template <auto Kernel>
void allow_shared_once(const Launch& launch, int bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << launch.device;
  if (done.load(std::memory_order_relaxed) & bit) return;
  launch.allow_shared(Kernel, bytes);
  done.fetch_or(bit, std::memory_order_relaxed);
}

// Keeps the split of L1 and shared memory as a kernel with much shared memory left it: changing it
// would wait until the multiprocessor is empty. Once per device.
template <auto Kernel>
void prefer_shared_once(const Launch& launch) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << launch.device;
  if (done.load(std::memory_order_relaxed) & bit) return;
  check_cuda(launch.op,
             cudaFuncSetAttribute(Kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "cudaFuncSetAttribute");
  done.fetch_or(bit, std::memory_order_relaxed);
}

// Pieces of one workspace, each at a multiple of 256 bytes.
class Workspace {
 public:
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ = (bytes_ + count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace torch_pd
