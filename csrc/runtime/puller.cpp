// Puller: fills a ring with the weights of a model, one item (a whole matrix) after the other in
// the cyclic order of their use, ahead of the computation.
//
// Uses are numbered 0, 1, 2, ...; use u is of item u % n. An item's place in the ring is fixed, and
// gate[i] says how many uses back the last one lies that shares bytes with it: use u may be filled
// once use u - gate is released. So copies are issued in order, as far ahead as the gates allow, by
// the thread that releases.
//
// On a GPU the copies go to side streams by copy engine: ready events there, free events on the
// stream that computes; nothing waits on the host. On the CPU a thread copies, so the overlap is as
// real as on the GPU. `poison` fills what is released with 0xff and `delays` slow copies down, for
// tests.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "runtime/bindings.h"
#include "runtime/cuda_call.h"

namespace py = pybind11;

namespace torch_pd {

namespace {

// `rows` of `width` bytes.
struct Copy {
  uint64_t from, from_pitch, to, to_pitch, width, rows;

  bool flat() const { return rows == 1 || (from_pitch == width && to_pitch == width); }
};

struct Item {
  uint64_t address, nbytes;  // in the ring
  std::vector<Copy> copies;
};

class Puller {
 public:
  using CopyTuple = std::tuple<uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>;
  using ItemTuple = std::tuple<uint64_t, uint64_t, std::vector<CopyTuple>>;

  Puller(int device, const std::vector<ItemTuple>& items, std::vector<int64_t> gates, int streams,
         bool poison, std::vector<int64_t> delays)
      : device_(device), gates_(std::move(gates)), poison_(poison), delays_(std::move(delays)) {
    for (const auto& [address, nbytes, copies] : items) {
      Item item{address, nbytes, {}};
      for (const auto& [from, from_pitch, to, to_pitch, width, rows] : copies) {
        item.copies.push_back({from, from_pitch, to, to_pitch, width, rows});
      }
      items_.push_back(std::move(item));
    }
    if (items_.empty() || gates_.size() != items_.size()) {
      throw std::invalid_argument("Puller: " + std::to_string(items_.size()) + " items, " +
                                  std::to_string(gates_.size()) + " gates");
    }
    for (int64_t gate : gates_) {
      if (gate < 1 || gate > count()) throw std::invalid_argument("Puller: a gate out of range");
    }
    if (device_ < 0) {
      thread_ = std::thread([this] { run(); });
    } else {
      open_streams(streams);
    }
  }

  ~Puller() { close(); }

  // Issues what the gates allow. Called once everything that is read has been written.
  void start() {
    check_open();
    started_ = true;
    issue();
  }

  // Makes `stream` (on the CPU: the caller) wait until use `use` has been filled.
  void acquire(int64_t use, uint64_t stream) {
    check_open();
    if (use != released_ || use >= issued_) {
      throw std::logic_error("Puller: use " + std::to_string(use) + " acquired, but " +
                             std::to_string(released_) + " comes next");
    }
    if (device_ < 0) {
      std::unique_lock lock(mutex_);
      filled_.wait(lock, [&] { return copied_ > use; });
      return;
    }
    wait_ready(use, stream);
  }

  // What `stream` was given so far is the last reader of use `use`.
  void release(int64_t use, uint64_t stream) {
    check_open();
    if (use != released_) throw std::logic_error("Puller: released out of order");
    if (device_ < 0) {
      const Item& item = items_[use % count()];
      if (poison_) std::memset(reinterpret_cast<void*>(item.address), 0xff, item.nbytes);
    } else {
      record_free(use, stream);
    }
    released_ = use + 1;
    issue();
  }

  // Passes over the uses before `use`, which nobody reads.
  void skip(int64_t use, uint64_t stream) {
    check_open();
    while (released_ < use) {
      // Bytes may be overwritten only after the copy that is under way.
      if (released_ < issued_) {
        acquire(released_, stream);
      } else {
        throw std::logic_error("Puller: a use before the one that comes next was not issued");
      }
      release(released_, stream);
    }
  }

  // Waits for the copies under way; issues no more. Calling it twice is fine.
  void close() {
    if (closed_) return;
    closed_ = true;
    if (device_ < 0) {
      {
        std::lock_guard lock(mutex_);
        stop_ = true;
      }
      queued_.notify_one();
      thread_.join();
    } else {
      close_streams();
    }
  }

 private:
  int64_t count() const { return static_cast<int64_t>(items_.size()); }

  void check_open() const {
    if (closed_) throw std::logic_error("Puller: closed");
  }

  void issue() {
    if (!started_) return;
    // At most one use of an item is under way: a gate is at most the number of items.
    while (issued_ - gates_[issued_ % count()] < released_) {
      if (device_ < 0) {
        std::lock_guard lock(mutex_);
        queue_.push_back(issued_);
        queued_.notify_one();
      } else {
        launch(issued_);
      }
      ++issued_;
    }
  }

  void run() {
    for (;;) {
      int64_t use;
      {
        std::unique_lock lock(mutex_);
        queued_.wait(lock, [&] { return stop_ || !queue_.empty(); });
        if (stop_) return;
        use = queue_.front();
        queue_.pop_front();
      }
      for (const Copy& copy : items_[use % count()].copies) {
        if (!delays_.empty()) {
          const int64_t delay = delays_[next_delay_++ % delays_.size()];
          std::this_thread::sleep_for(std::chrono::microseconds(delay));
        }
        for (uint64_t row = 0; row < copy.rows; ++row) {
          std::memcpy(reinterpret_cast<char*>(copy.to + row * copy.to_pitch),
                      reinterpret_cast<const char*>(copy.from + row * copy.from_pitch), copy.width);
        }
      }
      {
        std::lock_guard lock(mutex_);
        copied_ = use + 1;
      }
      filled_.notify_all();
    }
  }

#ifdef TORCH_PD_RUNTIME_CUDA
  void open_streams(int streams) {
    CudaDevice guard(device_);
    streams_.resize(streams);
    for (auto& stream : streams_) {
      cuda_call("cudaStreamCreate", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
    ready_.resize(items_.size() * streams);
    free_.resize(items_.size());
    for (auto* events : {&ready_, &free_}) {
      for (auto& event : *events) {
        cuda_call("cudaEventCreate", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      }
    }
  }

  void start_copy(const Copy& copy, cudaStream_t stream) {
    void* to = reinterpret_cast<void*>(copy.to);
    void* from = reinterpret_cast<void*>(copy.from);
    if (copy.flat()) {
      cuda_call("cudaMemcpyAsync", cudaMemcpyAsync(to, from, copy.width * copy.rows,
                                                   cudaMemcpyDeviceToDevice, stream));
    } else {
      cuda_call("cudaMemcpy2DAsync",
                cudaMemcpy2DAsync(to, copy.to_pitch, from, copy.from_pitch, copy.width, copy.rows,
                                  cudaMemcpyDeviceToDevice, stream));
    }
  }

  // Streams that copy for an item; the others need not be waited for.
  size_t used(const Item& item) const { return std::min(streams_.size(), item.copies.size()); }

  void launch(int64_t use) {
    CudaDevice guard(device_);
    const int64_t index = use % count(), opener = use - gates_[index];
    const Item& item = items_[index];
    if (opener >= 0) {
      for (size_t i = 0; i < used(item); ++i) {
        cuda_call("cudaStreamWaitEvent",
                  cudaStreamWaitEvent(streams_[i], free_[opener % count()], 0));
      }
    }
    for (size_t i = 0; i < item.copies.size(); ++i) {
      const Copy& copy = item.copies[i];
      start_copy(copy, streams_[i % streams_.size()]);
    }
    for (size_t i = 0; i < used(item); ++i) {
      cuda_call("cudaEventRecord",
                cudaEventRecord(ready_[index * streams_.size() + i], streams_[i]));
    }
  }

  void wait_ready(int64_t use, uint64_t stream) {
    for (size_t i = 0; i < used(items_[use % count()]); ++i) {
      cuda_call("cudaStreamWaitEvent",
                cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream),
                                    ready_[use % count() * streams_.size() + i], 0));
    }
  }

  void record_free(int64_t use, uint64_t stream) {
    auto reader = reinterpret_cast<cudaStream_t>(stream);
    const Item& item = items_[use % count()];
    if (poison_) {
      cuda_call("cudaMemsetAsync",
                cudaMemsetAsync(reinterpret_cast<void*>(item.address), 0xff, item.nbytes, reader));
    }
    cuda_call("cudaEventRecord", cudaEventRecord(free_[use % count()], reader));
  }

  void close_streams() {
    // Errors cannot be helped here: the process is ending or the context is gone.
    for (auto stream : streams_) {
      cudaStreamSynchronize(stream);
      cudaStreamDestroy(stream);
    }
    for (auto* events : {&ready_, &free_}) {
      for (auto event : *events) cudaEventDestroy(event);
    }
  }

  std::vector<cudaStream_t> streams_;
  std::vector<cudaEvent_t> ready_, free_;
#else
  void open_streams(int) {
    throw std::invalid_argument("Puller: a GPU needs a CUDA build of torch_pd");
  }
  void launch(int64_t) {}
  void wait_ready(int64_t, uint64_t) {}
  void record_free(int64_t, uint64_t) {}
  void close_streams() {}
#endif

  int device_;
  std::vector<Item> items_;
  std::vector<int64_t> gates_;
  bool poison_;
  std::vector<int64_t> delays_;
  size_t next_delay_ = 0;
  bool started_ = false, closed_ = false;
  int64_t issued_ = 0, released_ = 0;

  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable queued_, filled_;
  std::deque<int64_t> queue_;
  int64_t copied_ = 0;
  bool stop_ = false;
};

}  // namespace

}  // namespace torch_pd

void bind_puller(py::module_& m) {
  using torch_pd::Puller;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Puller>(m, "Puller",
                     "Fills a ring in the cyclic order of use, ahead of the computation. Items are "
                     "(address, bytes, copies), copies (from, pitch, to, pitch, width, rows), all "
                     "in bytes; gates say how many uses back the bytes were used last. device -1 "
                     "is the CPU. poison and delays (microseconds a copy) are for tests.")
      .def(py::init<int, const std::vector<Puller::ItemTuple>&, std::vector<int64_t>, int, bool,
                    std::vector<int64_t>>(),
           py::arg("device"), py::arg("items"), py::arg("gates"), py::arg("streams") = 1,
           py::arg("poison") = false, py::arg("delays") = std::vector<int64_t>{})
      .def("start", &Puller::start, Release())
      .def("acquire", &Puller::acquire, py::arg("use"), py::arg("stream"), Release())
      .def("release", &Puller::release, py::arg("use"), py::arg("stream"), Release())
      .def("skip", &Puller::skip, py::arg("use"), py::arg("stream"), Release())
      .def("close", &Puller::close, Release());
}
