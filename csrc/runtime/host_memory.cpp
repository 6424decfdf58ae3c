// HostMemory: a large block of host memory for KV pages, touched in parallel, placed on one NUMA
// node and registered with CUDA chunk by chunk. (pin_memory rounds sizes up to a power of two and
// holds everything up for as long as it takes.)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <exception>
#include <fstream>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime/bindings.h"
#include "runtime/cuda_call.h"

namespace py = pybind11;

namespace torch_pd {

namespace {

constexpr size_t kOsPage = 4096;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14
constexpr int kPreferred = 1;       // MPOL_PREFERRED

void touch(char* from, size_t bytes) {
  if (madvise(from, bytes, kPopulateWrite) == 0) return;
  for (size_t at = 0; at < bytes; at += kOsPage) {
    *static_cast<volatile char*>(from + at) = 0;
  }
}

class HostMemory {
 public:
  // device -1: not registered. node -1: wherever the touching threads run.
  HostMemory(size_t nbytes, size_t chunk_bytes, int device, int node, int threads)
      : nbytes_(nbytes), chunk_(chunk_bytes), device_(device) {
    if (nbytes == 0 || chunk_bytes == 0 || chunk_bytes % kOsPage != 0 || threads < 1) {
      throw std::invalid_argument("HostMemory: sizes and threads must be positive, chunks whole");
    }
    void* base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    base_ = static_cast<char*>(base);
    madvise(base_, nbytes, MADV_HUGEPAGE);  // advice: faster to touch, fewer entries for the GPU
    if (node >= 0 && node < 64) {
      const uint64_t mask = uint64_t{1} << node;
      bound_ = syscall(SYS_mbind, base_, nbytes, kPreferred, &mask, 64, 0) == 0;
    }
    try {
      fill(threads);
    } catch (...) {
      release();
      throw;
    }
  }
  ~HostMemory() { release(); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(base_); }
  size_t nbytes() const { return nbytes_; }
  bool bound() const { return bound_; }

  void release() {
    if (base_ == nullptr) return;
#ifdef TORCH_PD_RUNTIME_CUDA
    for (char* chunk : registered_) cudaHostUnregister(chunk);
    registered_.clear();
#endif
    munmap(base_, nbytes_);
    base_ = nullptr;
  }

 private:
  void fill(int threads) {
    const size_t chunks = (nbytes_ + chunk_ - 1) / chunk_;
    std::atomic<size_t> next{0};
    std::mutex mutex;
    std::exception_ptr error;
    const auto work = [&] {
      try {
        for (size_t i; (i = next.fetch_add(1)) < chunks;) {
          char* const from = base_ + i * chunk_;
          const size_t bytes = std::min(chunk_, nbytes_ - i * chunk_);
          touch(from, bytes);
          if (device_ >= 0) pin(from, bytes, mutex);
        }
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next = chunks;
      }
    };
    std::vector<std::thread> workers;
    const size_t count = std::min<size_t>(threads, chunks);
    for (size_t i = 0; i < count; ++i) workers.emplace_back(work);
    for (auto& worker : workers) worker.join();
    if (error) std::rethrow_exception(error);
  }

#ifdef TORCH_PD_RUNTIME_CUDA
  void pin(char* from, size_t bytes, std::mutex& mutex) {
    cuda_call("cudaSetDevice", cudaSetDevice(device_));  // the thread's own
    cuda_call("cudaHostRegister",
              cudaHostRegister(from, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
    const std::lock_guard lock(mutex);
    registered_.push_back(from);
  }
  std::vector<char*> registered_;
#else
  void pin(char*, size_t, std::mutex&) {
    throw std::invalid_argument("HostMemory: this build of torch_pd has no CUDA");
  }
#endif

  char* base_ = nullptr;
  size_t nbytes_, chunk_;
  int device_;
  bool bound_ = false;
};

// The NUMA node that a GPU hangs on, -1 if the machine does not say.
int numa_node(int device) {
#ifdef TORCH_PD_RUNTIME_CUDA
  char id[32] = {};
  cuda_call("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(id, sizeof(id), device));
  std::string path(id);
  std::transform(path.begin(), path.end(), path.begin(), ::tolower);
  std::ifstream file("/sys/bus/pci/devices/" + path + "/numa_node");
  int node = -1;
  return file >> node ? node : -1;
#else
  (void)device;
  return -1;
#endif
}

}  // namespace

}  // namespace torch_pd

void bind_host_memory(py::module_& m) {
  using namespace torch_pd;
  py::class_<HostMemory>(m, "HostMemory")
      .def(py::init<size_t, size_t, int, int, int>(), py::arg("nbytes"), py::arg("chunk_bytes"),
           py::arg("device"), py::arg("node"), py::arg("threads"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("address", &HostMemory::address)
      .def_property_readonly("nbytes", &HostMemory::nbytes)
      .def_property_readonly("bound", &HostMemory::bound)
      .def("release", &HostMemory::release, py::call_guard<py::gil_scoped_release>());
  m.def("numa_node", &numa_node, py::arg("device"));
}
