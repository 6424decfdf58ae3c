// Migrator: copies whole KV pages between the GPU's pool and the host's, in batches, one FIFO queue
// for each direction. On a GPU the queues are side streams and the copy engines work; on the CPU,
// where both pools are host memory, they are threads.
//
// Batches of a direction are numbered 1, 2, 3, ...: the tickets. A batch runs after all earlier
// ones of its direction, after ticket `after` of the other direction and, on a GPU, after
// everything that the compute stream was given before. The copies of one batch run in any order.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime/bindings.h"
#include "runtime/cuda_call.h"

namespace py = pybind11;

namespace torch_pd {

namespace {

using Pairs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

struct Copy {
  const char* from;
  char* to;
  size_t bytes;
};

struct Pools {
  char *gpu, *host;
  int64_t gpu_pages, host_pages;
  size_t page_bytes;
  int64_t chunk_pages;  // of the host pool: one copy must not cross registered chunks

  // Pairs are (source page, destination page); out: from the GPU to the host. Neighbours on both
  // sides become one copy.
  std::vector<Copy> copies(bool out, const int64_t* pairs, size_t count) const {
    std::vector<Copy> list;
    list.reserve(count);
    int64_t last_gpu = -2, last_host = -2;
    for (size_t i = 0; i < count; ++i) {
      const int64_t g = pairs[2 * i + (out ? 0 : 1)], h = pairs[2 * i + (out ? 1 : 0)];
      if (g < 0 || g >= gpu_pages || h < 0 || h >= host_pages) {
        throw std::invalid_argument("Migrator: page " + std::to_string(g) + " of " +
                                    std::to_string(gpu_pages) + " or " + std::to_string(h) +
                                    " of " + std::to_string(host_pages) + " does not exist");
      }
      if (g == last_gpu + 1 && h == last_host + 1 && h % chunk_pages != 0) {
        list.back().bytes += page_bytes;
      } else {
        char *const on_gpu = gpu + g * page_bytes, *const on_host = host + h * page_bytes;
        list.push_back({out ? on_gpu : on_host, out ? on_host : on_gpu, page_bytes});
      }
      last_gpu = g;
      last_host = h;
    }
    return list;
  }
};

// The CPU twin: a thread for each direction.
class Threads {
 public:
  Threads() {
    for (int d = 0; d < 2; ++d) workers_[d] = std::thread([this, d] { work(d); });
  }
  ~Threads() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int64_t submit(int direction, std::vector<Copy> copies, int64_t after) {
    const std::lock_guard lock(mutex_);
    queues_[direction].push_back({std::move(copies), after});
    changed_.notify_all();
    return ++submitted_[direction];
  }
  int64_t done(int direction) {
    const std::lock_guard lock(mutex_);
    return done_[direction];
  }
  void finish(int direction, int64_t ticket) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_[direction] >= ticket; });
  }

 private:
  struct Job {
    std::vector<Copy> copies;
    int64_t after;
  };

  void work(int direction) {
    std::unique_lock lock(mutex_);
    for (;;) {
      auto& queue = queues_[direction];
      changed_.wait(lock, [&] {
        return (queue.empty() ? stop_ : done_[1 - direction] >= queue.front().after);
      });
      if (queue.empty()) return;
      const Job job = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      for (const Copy& copy : job.copies) std::memcpy(copy.to, copy.from, copy.bytes);
      lock.lock();
      ++done_[direction];
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> queues_[2];
  int64_t submitted_[2] = {0, 0}, done_[2] = {0, 0};
  bool stop_ = false;
  std::thread workers_[2];
};

#ifdef TORCH_PD_RUNTIME_CUDA
class Streams {
 public:
  explicit Streams(int device) : device_(device) {
    const CudaDevice guard(device);
    for (auto& lane : lanes_) {
      cuda_call("cudaStreamCreate", cudaStreamCreateWithFlags(&lane.stream, cudaStreamNonBlocking));
    }
    int driver = 0;
    cuda_call("cudaDriverGetVersion", cudaDriverGetVersion(&driver));
    batched_ = CUDART_VERSION >= 12080 && driver >= 12080;
  }
  ~Streams() {
    // Errors have nowhere to go here; a broken context stays broken.
    for (auto& lane : lanes_) {
      cudaStreamSynchronize(lane.stream);
      for (const auto& pending : lane.pending) cudaEventDestroy(pending.event);
      cudaStreamDestroy(lane.stream);
    }
    for (cudaEvent_t event : spare_) cudaEventDestroy(event);
  }

  bool batched() const { return batched_; }
  cudaStream_t stream(int direction) const { return lanes_[direction].stream; }

  // What the next batch of a direction waits for.
  void begin(int direction, int64_t after, cudaStream_t compute) {
    const CudaDevice guard(device_);
    const cudaEvent_t event = take_event();
    cuda_call("cudaEventRecord", cudaEventRecord(event, compute));
    cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(stream(direction), event, 0));
    spare_.push_back(event);  // a wait holds to the record that it saw
    wait(1 - direction, after, stream(direction));
  }

  void copy(int direction, const std::vector<Copy>& copies) {
    const CudaDevice guard(device_);
    const cudaStream_t stream = lanes_[direction].stream;
#if CUDART_VERSION >= 12080
    if (batched_ && copies.size() > 1) {
      std::vector<void*> to, from;
      std::vector<size_t> bytes;
      for (const Copy& copy : copies) {
        to.push_back(copy.to);
        from.push_back(const_cast<char*>(copy.from));
        bytes.push_back(copy.bytes);
      }
      cudaMemcpyAttributes attributes{};
      attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
      size_t first = 0;
#if CUDART_VERSION >= 13000
      std::vector<const void*> sources(from.begin(), from.end());
      cuda_call("cudaMemcpyBatchAsync",
                cudaMemcpyBatchAsync(to.data(), sources.data(), bytes.data(), bytes.size(),
                                     &attributes, &first, 1, stream));
#else
      size_t failed = 0;
      cuda_call("cudaMemcpyBatchAsync",
                cudaMemcpyBatchAsync(to.data(), from.data(), bytes.data(), bytes.size(),
                                     &attributes, &first, 1, &failed, stream));
#endif
      return;
    }
#endif
    for (const Copy& copy : copies) {
      cuda_call("cudaMemcpyAsync",
                cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyDefault, stream));
    }
  }

  int64_t end(int direction) {
    const CudaDevice guard(device_);
    auto& lane = lanes_[direction];
    const cudaEvent_t event = take_event();
    cuda_call("cudaEventRecord", cudaEventRecord(event, lane.stream));
    lane.pending.push_back({++lane.submitted, event});
    return lane.submitted;
  }

  int64_t done(int direction) {
    auto& lane = lanes_[direction];
    while (!lane.pending.empty()) {
      const cudaError_t status = cudaEventQuery(lane.pending.front().event);
      if (status == cudaErrorNotReady) {
        cudaGetLastError();
        break;
      }
      cuda_call("a page move", status);
      lane.done = lane.pending.front().ticket;
      spare_.push_back(lane.pending.front().event);
      lane.pending.pop_front();
    }
    return lane.done;
  }

  // `stream` goes on after the ticket.
  void wait(int direction, int64_t ticket, cudaStream_t stream) {
    if (const Pending* pending = find(direction, ticket)) {
      const CudaDevice guard(device_);
      cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, pending->event, 0));
    }
  }

  // The host waits.
  void finish(int direction, int64_t ticket) {
    if (const Pending* pending = find(direction, ticket)) {
      cuda_call("a page move", cudaEventSynchronize(pending->event));
    }
  }

 private:
  struct Pending {
    int64_t ticket;
    cudaEvent_t event;
  };
  struct Lane {
    cudaStream_t stream = nullptr;
    std::deque<Pending> pending;
    int64_t submitted = 0, done = 0;
  };

  // Null if the ticket was seen to be complete.
  const Pending* find(int direction, int64_t ticket) const {
    const auto& pending = lanes_[direction].pending;
    if (pending.empty() || ticket < pending.front().ticket) return nullptr;
    const size_t index = ticket - pending.front().ticket;
    if (index >= pending.size()) throw std::invalid_argument("Migrator: no such ticket yet");
    return &pending[index];
  }

  cudaEvent_t take_event() {
    if (spare_.empty()) {
      cudaEvent_t event;
      cuda_call("cudaEventCreate", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      return event;
    }
    const cudaEvent_t event = spare_.back();
    spare_.pop_back();
    return event;
  }

  int device_;
  bool batched_ = false;
  Lane lanes_[2];
  std::vector<cudaEvent_t> spare_;
};
#endif

class Migrator {
 public:
  // device -1: both pools are host memory.
  Migrator(int device, size_t page_bytes, uintptr_t gpu, int64_t gpu_pages, uintptr_t host,
           int64_t host_pages, int64_t chunk_pages)
      : pools_{reinterpret_cast<char*>(gpu),
               reinterpret_cast<char*>(host),
               gpu_pages,
               host_pages,
               page_bytes,
               chunk_pages} {
    if (page_bytes == 0 || chunk_pages < 1) {
      throw std::invalid_argument("Migrator: pages and chunks must not be empty");
    }
    if (device < 0) {
      threads_ = std::make_unique<Threads>();
      return;
    }
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_ = std::make_unique<Streams>(device);
#else
    throw std::invalid_argument("Migrator: this build of torch_pd has no CUDA");
#endif
  }

  int64_t submit(bool out, const Pairs& pairs, int64_t after, uintptr_t compute) {
    if (pairs.ndim() != 2 || pairs.shape(1) != 2) {
      throw std::invalid_argument("Migrator: moves must be [n, 2]");
    }
    std::vector<Copy> copies = pools_.copies(out, pairs.data(), pairs.shape(0));
    const py::gil_scoped_release release;
    if (threads_) return threads_->submit(out, std::move(copies), after);
    (void)compute;
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_->begin(out, after, reinterpret_cast<cudaStream_t>(compute));
    streams_->copy(out, copies);
    return streams_->end(out);
#else
    return 0;
#endif
  }

  int64_t done(bool out) {
    if (threads_) return threads_->done(out);
#ifdef TORCH_PD_RUNTIME_CUDA
    return streams_->done(out);
#else
    return 0;
#endif
  }

  void wait(bool out, int64_t ticket, uintptr_t stream) {
    if (threads_) return threads_->finish(out, ticket);
    (void)stream;
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_->wait(out, ticket, reinterpret_cast<cudaStream_t>(stream));
#endif
  }

  void finish(bool out, int64_t ticket) {
    if (threads_) return threads_->finish(out, ticket);
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_->finish(out, ticket);
#endif
  }

#ifdef TORCH_PD_RUNTIME_CUDA
  bool batched() const { return streams_ && streams_->batched(); }
  uintptr_t stream(bool out) const {
    return streams_ ? reinterpret_cast<uintptr_t>(streams_->stream(out)) : 0;
  }
  void begin(bool out, int64_t after, uintptr_t compute) {
    streams_->begin(out, after, reinterpret_cast<cudaStream_t>(compute));
  }
  int64_t end(bool out) { return streams_->end(out); }
#endif

 private:
  Pools pools_;
  std::unique_ptr<Threads> threads_;
#ifdef TORCH_PD_RUNTIME_CUDA
  std::unique_ptr<Streams> streams_;
#endif
};

}  // namespace

}  // namespace torch_pd

void bind_migrator(py::module_& m) {
  using namespace torch_pd;
  py::class_<Migrator>(m, "Migrator")
      .def(py::init<int, size_t, uintptr_t, int64_t, uintptr_t, int64_t, int64_t>(),
           py::arg("device"), py::arg("page_bytes"), py::arg("gpu"), py::arg("gpu_pages"),
           py::arg("host"), py::arg("host_pages"), py::arg("chunk_pages"))
      .def("submit", &Migrator::submit, py::arg("out"), py::arg("pairs"), py::arg("after"),
           py::arg("compute"))
      .def("done", &Migrator::done, py::arg("out"))
      .def("wait", &Migrator::wait, py::arg("out"), py::arg("ticket"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>())
      .def("finish", &Migrator::finish, py::arg("out"), py::arg("ticket"),
           py::call_guard<py::gil_scoped_release>())
#ifdef TORCH_PD_RUNTIME_CUDA
      .def_property_readonly("batched", &Migrator::batched)
      .def("stream", &Migrator::stream, py::arg("out"))
      .def("begin", &Migrator::begin, py::arg("out"), py::arg("after"), py::arg("compute"))
      .def("end", &Migrator::end, py::arg("out"))
#endif
      ;
}
