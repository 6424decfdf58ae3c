// PeerBlock: a block of GPU memory that other processes of the host map too.
//
// CUDA's virtual memory management with POSIX file descriptors, not CUDA IPC: a mapping holds its
// own reference to the physical memory, so a reader goes on reading sound bytes when the owner is
// killed in the middle of a copy, and the memory is freed when the last process has let go of it.
// (After CUDA IPC, freeing an exported block that a peer has open is undefined.)
//
// On the CPU the same is done with memfd and mmap, which Python has (peer.py).
#include "runtime/bindings.h"
#include "runtime/cuda_driver.h"
#include "runtime/dlpack.h"

#ifdef TORCH_PD_RUNTIME_CUDA
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace torch_pd {

namespace {

// Physical memory mapped at an address of its own for one device; freed when it is destroyed.
class Mapping {
 public:
  Mapping(int device, size_t nbytes, int fd) : device_(device) {
    const Driver& cu = Driver::get();
    CudaDevice guard(device);
    cuda_call("cudaFree", cudaFree(nullptr));  // the context exists from here on
    CUmemAllocationProp prop = memory_of(device);
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    size_t unit = 0;
    driver_call("cuMemGetAllocationGranularity",
                cu.granularity(&unit, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
    size_ = (nbytes + unit - 1) / unit * unit;
    if (fd < 0) {
      const CUresult status = cu.create(&handle_, size_, &prop, 0);
      if (status == CUDA_ERROR_OUT_OF_MEMORY) {
        size_t free = 0, total = 0;
        cudaMemGetInfo(&free, &total);
        throw std::runtime_error("GPU " + std::to_string(device) + " has " + std::to_string(free) +
                                 " bytes free, a block of " + std::to_string(size_) +
                                 " does not fit");
      }
      driver_call("cuMemCreate", status);
    } else {
      void* shareable = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
      driver_call("cuMemImportFromShareableHandle",
                  cu.from_fd(&handle_, shareable, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    }
    try {
      driver_call("cuMemAddressReserve", cu.reserve(&address_, size_, unit, 0, 0));
      driver_call("cuMemMap", cu.map(address_, size_, 0, handle_, 0));
      mapped_ = true;
      driver_call("cuMemSetAccess (is the other GPU reachable over NVLink?)",
                  let_access(device, address_, size_));
    } catch (...) {
      clear();
      throw;
    }
  }
  ~Mapping() { clear(); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  int to_fd() const {
    int fd = -1;
    driver_call("cuMemExportToShareableHandle",
                Driver::get().to_fd(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    return fd;
  }

  CUdeviceptr address() const { return address_; }
  size_t size() const { return size_; }
  int device() const { return device_; }

 private:
  // Errors cannot be helped here: the process is ending or the context is gone.
  void clear() {
    const Driver& cu = Driver::get();
    if (mapped_) cu.unmap(address_, size_);
    if (address_ != 0) cu.free(address_, size_);
    cu.release(handle_);
  }

  int device_;
  size_t size_ = 0;
  CUdeviceptr address_ = 0;
  CUmemGenericAllocationHandle handle_ = 0;
  bool mapped_ = false;
};

class PeerBlock {
 public:
  PeerBlock(int device, size_t nbytes, int fd)
      : mapping_(std::make_shared<Mapping>(device, nbytes, fd)), nbytes_(nbytes) {}

  uint64_t address() const { return mapping_->address(); }
  size_t size() const { return mapping_->size(); }
  int to_fd() const { return mapping_->to_fd(); }

  py::capsule dlpack() const {
    return to_dlpack(mapping_, mapping_->address(), nbytes_, mapping_->device());
  }

 private:
  std::shared_ptr<Mapping> mapping_;
  size_t nbytes_;
};

}  // namespace

}  // namespace torch_pd

void bind_peer_memory(py::module_& m) {
  using torch_pd::PeerBlock;
  py::class_<PeerBlock>(m, "PeerBlock",
                        "GPU memory of `nbytes` that other processes can map: new on `device`, or "
                        "another process's, by its file descriptor, mapped for `device`. Freed "
                        "when the block and all tensors of it are gone, in every process.")
      .def(py::init<int, size_t, int>(), py::arg("device"), py::arg("nbytes"), py::arg("fd") = -1)
      .def_property_readonly("address", &PeerBlock::address)
      .def_property_readonly("size", &PeerBlock::size, "Bytes mapped: nbytes rounded up.")
      .def("to_fd", &PeerBlock::to_fd, "A new file descriptor, for the caller to close.")
      .def("dlpack", &PeerBlock::dlpack, "A DLPack capsule: uint8 [nbytes] on `device`.");
}
#else
void bind_peer_memory(pybind11::module_&) {}
#endif
