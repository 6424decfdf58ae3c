// ElasticMemory: a range of addresses that stays, and memory under its lower end that comes and
// goes in chunks.
//
// On a GPU by CUDA's virtual memory management. Addresses above the mapped chunks are all mapped to
// one and the same further chunk, the filler: a kernel that is given a wrong page there reads
// nonsense instead of a fault that would cost the process its GPU. On the CPU by mprotect and
// madvise: addresses above read as zero (the kernel's shared zero page) and cannot be written.
//
// Whoever unmaps sees to it that nothing under way reads or writes those chunks; neither mapping
// nor unmapping waits for the device.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

#include "runtime/bindings.h"
#include "runtime/cuda_driver.h"
#include "runtime/dlpack.h"

namespace py = pybind11;

namespace torch_pd {

namespace {

// What chunks must be a multiple of.
size_t chunk_unit(int device) {
  if (device < 0) return static_cast<size_t>(sysconf(_SC_PAGESIZE));
#ifdef TORCH_PD_RUNTIME_CUDA
  CudaDevice guard(device);
  cuda_call("cudaFree", cudaFree(nullptr));  // the context exists from here on
  const CUmemAllocationProp prop = memory_of(device);
  size_t unit = 0;
  driver_call("cuMemGetAllocationGranularity",
              Driver::get().granularity(&unit, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  return unit;
#else
  throw std::invalid_argument("ElasticMemory: this build of torch_pd has no CUDA");
#endif
}

class ElasticMemory {
 public:
  // device -1: the CPU. Nothing is mapped at first.
  ElasticMemory(int device, size_t nbytes, size_t chunk_bytes)
      : device_(device), nbytes_(nbytes), chunk_(chunk_bytes) {
    if (nbytes == 0 || chunk_bytes == 0 || chunk_bytes % chunk_unit(device) != 0) {
      throw std::invalid_argument("ElasticMemory: nbytes must be positive, chunks of whole units");
    }
    chunks_ = (nbytes + chunk_ - 1) / chunk_;
    try {
      reserve();
    } catch (...) {
      release();
      throw;
    }
  }
  ~ElasticMemory() { release(); }
  ElasticMemory(const ElasticMemory&) = delete;
  ElasticMemory& operator=(const ElasticMemory&) = delete;

  uint64_t address() const { return base_; }
  size_t nbytes() const { return nbytes_; }
  int device() const { return device_; }
  size_t chunks() const { return chunks_; }
  size_t mapped() const { return mapped_; }

  // Maps chunks until the first `chunks` are there, or the device has no more memory; returns how
  // many are mapped. Those that were there keep their contents, new ones hold anything.
  size_t map(size_t chunks) {
    chunks = std::min(chunks, chunks_);
    if (chunks <= mapped_) return mapped_;
    if (device_ < 0) {
      protect(mapped_, chunks, PROT_READ | PROT_WRITE);
      mapped_ = chunks;
    } else {
      map_gpu(chunks);
    }
    return mapped_;
  }

  // Gives back all but the first `chunks`.
  size_t unmap(size_t chunks) {
    if (chunks >= mapped_) return mapped_;
    if (device_ < 0) {
      if (madvise(at(chunks), (mapped_ - chunks) * chunk_, MADV_DONTNEED) != 0) fail("madvise");
      protect(chunks, mapped_, PROT_READ);
      mapped_ = chunks;
    } else {
      unmap_gpu(chunks);
    }
    return mapped_;
  }

 private:
  [[noreturn]] static void fail(const char* what) {
    throw std::system_error(errno, std::generic_category(), what);
  }

  void* at(size_t chunk) const { return reinterpret_cast<void*>(base_ + chunk * chunk_); }

  void protect(size_t from, size_t to, int access) {
    if (mprotect(at(from), (to - from) * chunk_, access) != 0) fail("mprotect");
  }

#ifdef TORCH_PD_RUNTIME_CUDA
  void reserve() {
    if (device_ < 0) return reserve_cpu();
    const Driver& cu = Driver::get();
    CudaDevice guard(device_);
    CUdeviceptr address = 0;
    driver_call("cuMemAddressReserve",
                cu.reserve(&address, chunks_ * chunk_, chunk_unit(device_), 0, 0));
    base_ = address;
    const CUmemAllocationProp prop = memory_of(device_);
    driver_call("cuMemCreate", cu.create(&filler_, chunk_, &prop, 0));
    has_filler_ = true;
    fill(0, chunks_);
    cuda_call("cudaMemset", cudaMemset(at(0), 0, chunk_));
    cuda_call("cudaDeviceSynchronize", cudaDeviceSynchronize());
  }

  // The filler at the addresses of chunks that have nothing.
  void fill(size_t from, size_t to) {
    const Driver& cu = Driver::get();
    for (size_t i = from; i < to; ++i) {
      driver_call("cuMemMap", cu.map(base_ + i * chunk_, chunk_, 0, filler_, 0));
    }
    driver_call("cuMemSetAccess", let_access(device_, base_ + from * chunk_, (to - from) * chunk_));
  }

  void map_gpu(size_t chunks) {
    const Driver& cu = Driver::get();
    CudaDevice guard(device_);
    const CUmemAllocationProp prop = memory_of(device_);
    const size_t before = mapped_;
    while (mapped_ < chunks) {
      CUmemGenericAllocationHandle handle = 0;
      const CUresult status = cu.create(&handle, chunk_, &prop, 0);
      if (status == CUDA_ERROR_OUT_OF_MEMORY) break;
      driver_call("cuMemCreate", status);
      const CUdeviceptr address = base_ + mapped_ * chunk_;
      driver_call("cuMemUnmap", cu.unmap(address, chunk_));
      driver_call("cuMemMap", cu.map(address, chunk_, 0, handle, 0));
      driver_call("cuMemRelease", cu.release(handle));  // the mapping keeps it
      ++mapped_;
    }
    if (mapped_ > before) {
      driver_call("cuMemSetAccess",
                  let_access(device_, base_ + before * chunk_, (mapped_ - before) * chunk_));
    }
  }

  void unmap_gpu(size_t chunks) {
    const Driver& cu = Driver::get();
    CudaDevice guard(device_);
    const size_t before = mapped_;
    while (mapped_ > chunks) {
      driver_call("cuMemUnmap", cu.unmap(base_ + (mapped_ - 1) * chunk_, chunk_));
      --mapped_;
    }
    fill(chunks, before);
  }

  // Errors cannot be helped here: the process is ending or the context is gone.
  void release() {
    if (device_ < 0) return release_cpu();
    if (base_ == 0) return;
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaDeviceSynchronize();  // kernels may still read; unmapping would not wait for them
    const Driver& cu = Driver::get();
    for (size_t i = 0; i < chunks_; ++i) cu.unmap(base_ + i * chunk_, chunk_);
    if (has_filler_) cu.release(filler_);
    cu.free(base_, chunks_ * chunk_);
    base_ = 0;
    cudaSetDevice(before);
    cudaGetLastError();
  }

  CUmemGenericAllocationHandle filler_ = 0;
  bool has_filler_ = false;
#else
  void reserve() { reserve_cpu(); }
  void map_gpu(size_t) {}
  void unmap_gpu(size_t) {}
  void release() { release_cpu(); }
#endif

  void reserve_cpu() {
    void* base = mmap(nullptr, chunks_ * chunk_, PROT_READ,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) fail("mmap");
    base_ = reinterpret_cast<uint64_t>(base);
  }

  void release_cpu() {
    if (base_ != 0) munmap(at(0), chunks_ * chunk_);
    base_ = 0;
  }

  int device_;
  size_t nbytes_, chunk_, chunks_ = 0, mapped_ = 0;
  uint64_t base_ = 0;
};

}  // namespace

}  // namespace torch_pd

void bind_elastic_memory(py::module_& m) {
  using torch_pd::ElasticMemory;
  py::class_<ElasticMemory, std::shared_ptr<ElasticMemory>>(
      m, "ElasticMemory",
      "Addresses of `nbytes` on `device` (-1: the CPU) that stay, with memory under the first "
      "`mapped` of `chunks`. Freed when the object and all tensors of it are gone.")
      .def(py::init<int, size_t, size_t>(), py::arg("device"), py::arg("nbytes"),
           py::arg("chunk_bytes"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("address", &ElasticMemory::address)
      .def_property_readonly("chunks", &ElasticMemory::chunks)
      .def_property_readonly("mapped", &ElasticMemory::mapped)
      .def("map", &ElasticMemory::map, py::arg("chunks"), py::call_guard<py::gil_scoped_release>(),
           "Maps up to the first `chunks`, as far as the device has memory; returns `mapped`.")
      .def("unmap", &ElasticMemory::unmap, py::arg("chunks"),
           py::call_guard<py::gil_scoped_release>(),
           "Gives back all but the first `chunks`; returns `mapped`.")
      .def(
          "dlpack",
          [](const std::shared_ptr<ElasticMemory>& self) {
            return torch_pd::to_dlpack(self, self->address(), self->nbytes(), self->device());
          },
          "A DLPack capsule: uint8 [nbytes] on `device`.");
  m.def("chunk_unit", &torch_pd::chunk_unit, py::arg("device"),
        "What chunks of an ElasticMemory on `device` (-1: the CPU) must be a multiple of.");
}
