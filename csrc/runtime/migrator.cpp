// Migrator: copies whole KV pages between the GPU's pool and the pools under it (the host's, and
// memory of peer GPUs), in batches, one FIFO queue for each lane: a direction of a link. On a GPU
// the queues are side streams and the copy engines work; on the CPU, where all pools are host
// memory, they are threads.
//
// Batches of a lane are numbered 1, 2, 3, ...: the tickets. A batch runs after all earlier ones of
// its lane, after the tickets `after` of the other lanes and, on a GPU, after everything that the
// compute stream was given before. The copies of one batch run in any order.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
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

// Lanes: from the host, to the host, from peers, to peers (kv/moves.py).
using Tickets = std::vector<int64_t>;

// A run of pages of the pools under the GPU's.
struct Segment {
  int64_t first, pages;  // numbers of its pages
  char* base;
  int64_t chunk_pages;  // one copy must not cross chunks (the host's are registered one by one)
};

struct Pools {
  char* gpu;
  int64_t gpu_pages;
  size_t page_bytes;
  std::vector<Segment> segments;

  const Segment* find(int64_t page) const {
    for (const Segment& segment : segments) {
      if (page >= segment.first && page - segment.first < segment.pages) return &segment;
    }
    return nullptr;
  }

  // Pairs are (source page, destination page); out: from the GPU. Neighbours on both sides become
  // one copy.
  std::vector<Copy> copies(bool out, const int64_t* pairs, size_t count) const {
    std::vector<Copy> list;
    list.reserve(count);
    int64_t last_gpu = -2, last_page = -2;
    for (size_t i = 0; i < count; ++i) {
      const int64_t g = pairs[2 * i + (out ? 0 : 1)], p = pairs[2 * i + (out ? 1 : 0)];
      const Segment* segment = find(p);
      if (g < 0 || g >= gpu_pages || segment == nullptr) {
        throw std::invalid_argument("Migrator: page " + std::to_string(g) + " of " +
                                    std::to_string(gpu_pages) + " of the GPU, or " +
                                    std::to_string(p) + " under it, does not exist");
      }
      const int64_t index = p - segment->first;
      if (g == last_gpu + 1 && p == last_page + 1 && index % segment->chunk_pages != 0) {
        list.back().bytes += page_bytes;
      } else {
        char *const on_gpu = gpu + g * page_bytes, *const under =
                                                       segment->base + index * page_bytes;
        list.push_back({out ? on_gpu : under, out ? under : on_gpu, page_bytes});
      }
      last_gpu = g;
      last_page = p;
    }
    return list;
  }
};

// The CPU twin: a thread for each lane.
class Threads {
 public:
  explicit Threads(int lanes) : lanes_(lanes) {
    for (int i = 0; i < lanes; ++i) lanes_[i].worker = std::thread([this, i] { work(lanes_[i]); });
  }
  ~Threads() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (auto& lane : lanes_) lane.worker.join();
  }

  int64_t submit(int lane, std::vector<Copy> copies, Tickets after) {
    const std::lock_guard lock(mutex_);
    lanes_[lane].queue.push_back({std::move(copies), std::move(after)});
    changed_.notify_all();
    return ++lanes_[lane].submitted;
  }
  int64_t done(int lane) {
    const std::lock_guard lock(mutex_);
    return lanes_[lane].done;
  }
  void finish(int lane, int64_t ticket) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return lanes_[lane].done >= ticket; });
  }

 private:
  struct Job {
    std::vector<Copy> copies;
    Tickets after;
  };
  struct Lane {
    std::deque<Job> queue;
    int64_t submitted = 0, done = 0;
    std::thread worker;
  };

  bool may_run(const Job& job) const {
    for (size_t i = 0; i < job.after.size(); ++i) {
      if (lanes_[i].done < job.after[i]) return false;
    }
    return true;
  }

  void work(Lane& lane) {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return lane.queue.empty() ? stop_ : may_run(lane.queue.front()); });
      if (lane.queue.empty()) return;
      const Job job = std::move(lane.queue.front());
      lane.queue.pop_front();
      lock.unlock();
      for (const Copy& copy : job.copies) std::memcpy(copy.to, copy.from, copy.bytes);
      lock.lock();
      ++lane.done;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Lane> lanes_;
  bool stop_ = false;
};

#ifdef TORCH_PD_RUNTIME_CUDA
class Streams {
 public:
  Streams(int device, int lanes) : device_(device), lanes_(lanes) {
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

  cudaStream_t stream(int lane) const { return lanes_[lane].stream; }

  // What the next batch of a lane waits for.
  void begin(int lane, const Tickets& after, cudaStream_t compute) {
    const CudaDevice guard(device_);
    const cudaEvent_t event = take_event();
    cuda_call("cudaEventRecord", cudaEventRecord(event, compute));
    cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(stream(lane), event, 0));
    spare_.push_back(event);  // a wait holds to the record that it saw
    for (size_t i = 0; i < after.size(); ++i) {
      if (after[i] > 0) wait(i, after[i], stream(lane));
    }
  }

  void copy(int lane, const std::vector<Copy>& copies) {
    const CudaDevice guard(device_);
    const cudaStream_t stream = lanes_[lane].stream;
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

  int64_t end(int number) {
    const CudaDevice guard(device_);
    Lane& lane = lanes_[number];
    const cudaEvent_t event = take_event();
    cuda_call("cudaEventRecord", cudaEventRecord(event, lane.stream));
    lane.pending.push_back({++lane.submitted, event});
    return lane.submitted;
  }

  int64_t done(int number) {
    Lane& lane = lanes_[number];
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
  void wait(int lane, int64_t ticket, cudaStream_t stream) {
    if (const Pending* pending = find(lane, ticket)) {
      const CudaDevice guard(device_);
      cuda_call("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, pending->event, 0));
    }
  }

  // The host waits.
  void finish(int lane, int64_t ticket) {
    if (const Pending* pending = find(lane, ticket)) {
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
  const Pending* find(int lane, int64_t ticket) const {
    const auto& pending = lanes_[lane].pending;
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
  std::vector<Lane> lanes_;
  std::vector<cudaEvent_t> spare_;
};
#endif

class Migrator {
 public:
  using SegmentTuple = std::tuple<int64_t, int64_t, uintptr_t, int64_t>;

  // device -1: all pools are host memory. Segments are (first page, pages, address, chunk pages).
  Migrator(int device, size_t page_bytes, uintptr_t gpu, int64_t gpu_pages,
           const std::vector<SegmentTuple>& segments, int lanes)
      : pools_{reinterpret_cast<char*>(gpu), gpu_pages, page_bytes, {}}, lanes_(lanes) {
    for (const auto& [first, pages, address, chunk_pages] : segments) {
      if (chunk_pages < 1) throw std::invalid_argument("Migrator: chunks must not be empty");
      pools_.segments.push_back({first, pages, reinterpret_cast<char*>(address), chunk_pages});
    }
    if (page_bytes == 0 || lanes < 1) {
      throw std::invalid_argument("Migrator: pages must not be empty, lanes must be");
    }
    if (device < 0) {
      threads_ = std::make_unique<Threads>(lanes);
      return;
    }
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_ = std::make_unique<Streams>(device, lanes);
#else
    throw std::invalid_argument("Migrator: this build of torch_pd has no CUDA");
#endif
  }

  // Odd lanes lead out of the GPU.
  int64_t submit(int lane, const Pairs& pairs, const Tickets& after, uintptr_t compute) {
    check(lane, after);
    if (pairs.ndim() != 2 || pairs.shape(1) != 2) {
      throw std::invalid_argument("Migrator: moves must be [n, 2]");
    }
    std::vector<Copy> copies = pools_.copies(lane % 2 == 1, pairs.data(), pairs.shape(0));
    const py::gil_scoped_release release;
    if (threads_) return threads_->submit(lane, std::move(copies), after);
    (void)compute;
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_->begin(lane, after, reinterpret_cast<cudaStream_t>(compute));
    streams_->copy(lane, copies);
    return streams_->end(lane);
#else
    return 0;
#endif
  }

  int64_t done(int lane) {
    check(lane);
    if (threads_) return threads_->done(lane);
#ifdef TORCH_PD_RUNTIME_CUDA
    return streams_->done(lane);
#else
    return 0;
#endif
  }

  void wait(int lane, int64_t ticket, uintptr_t stream) {
    check(lane);
    if (threads_) return threads_->finish(lane, ticket);
    (void)stream;
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_->wait(lane, ticket, reinterpret_cast<cudaStream_t>(stream));
#endif
  }

  void finish(int lane, int64_t ticket) {
    check(lane);
    if (threads_) return threads_->finish(lane, ticket);
#ifdef TORCH_PD_RUNTIME_CUDA
    streams_->finish(lane, ticket);
#endif
  }

#ifdef TORCH_PD_RUNTIME_CUDA
  uintptr_t stream(int lane) const {
    check(lane);
    return streams_ ? reinterpret_cast<uintptr_t>(streams_->stream(lane)) : 0;
  }
  void begin(int lane, const Tickets& after, uintptr_t compute) {
    check(lane, after);
    streams_->begin(lane, after, reinterpret_cast<cudaStream_t>(compute));
  }
  int64_t end(int lane) {
    check(lane);
    return streams_->end(lane);
  }
#endif

 private:
  void check(int lane, const Tickets& after = {}) const {
    if (lane < 0 || lane >= lanes_ || after.size() > static_cast<size_t>(lanes_)) {
      throw std::invalid_argument("Migrator: no such lane");
    }
  }

  Pools pools_;
  int lanes_;
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
      .def(py::init<int, size_t, uintptr_t, int64_t, const std::vector<Migrator::SegmentTuple>&,
                    int>(),
           py::arg("device"), py::arg("page_bytes"), py::arg("gpu"), py::arg("gpu_pages"),
           py::arg("segments"), py::arg("lanes"))
      .def("submit", &Migrator::submit, py::arg("lane"), py::arg("pairs"), py::arg("after"),
           py::arg("compute"))
      .def("done", &Migrator::done, py::arg("lane"))
      .def("wait", &Migrator::wait, py::arg("lane"), py::arg("ticket"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>())
      .def("finish", &Migrator::finish, py::arg("lane"), py::arg("ticket"),
           py::call_guard<py::gil_scoped_release>())
#ifdef TORCH_PD_RUNTIME_CUDA
      .def("stream", &Migrator::stream, py::arg("lane"))
      .def("begin", &Migrator::begin, py::arg("lane"), py::arg("after"), py::arg("compute"))
      .def("end", &Migrator::end, py::arg("lane"))
#endif
      ;
}
