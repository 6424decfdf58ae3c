// DiskFile: records of one size in one file, read and written by a pool of threads past the page
// cache (O_DIRECT) where the file system allows it. A record's checksum is kept in memory: what is
// read is what was written, or an error.
#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <vector>

#include "runtime/bindings.h"

namespace py = pybind11;

namespace torch_pd {

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kAlign = 4096;  // of offsets, sizes and addresses under O_DIRECT
constexpr int kShort = -1;       // the file ended inside the record
constexpr int kCorrupt = -2;     // the checksum differs

size_t round_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// 64 bits over `bytes` bytes; eight lanes, so that it runs at the speed of memory. Each step is a
// bijection of its lane, so no change of a single word goes unseen; the record's number is part of
// it, so no record passes for another.
uint64_t checksum(const char* data, size_t bytes, uint64_t record) {
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15ull;
  uint64_t lanes[8];
  for (int i = 0; i < 8; ++i) lanes[i] = (record + 1) * kPrime + i;
  size_t at = 0;
  for (; at + 64 <= bytes; at += 64) {
    uint64_t words[8];
    std::memcpy(words, data + at, 64);
    for (int i = 0; i < 8; ++i) lanes[i] = std::rotl(lanes[i] ^ words[i], 29) * kPrime;
  }
  uint64_t words[8] = {};
  std::memcpy(words, data + at, bytes - at);
  uint64_t sum = bytes;
  for (int i = 0; i < 8; ++i) {
    sum = std::rotl(sum ^ std::rotl(lanes[i] ^ words[i], 29) * kPrime, 31) * kPrime;
  }
  return sum ^ (sum >> 32);
}

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

class DiskFile {
 public:
  // Makes the file, which must not exist, takes its space and removes its name at once: it goes
  // with the process, however that ends.
  DiskFile(const std::string& path, size_t record_bytes, int64_t num_records, int threads)
      : bytes_(record_bytes), stride_(round_up(record_bytes)), sums_(num_records) {
    if (record_bytes == 0 || num_records < 1 || threads < 1) {
      throw std::invalid_argument("DiskFile: records and threads must be positive");
    }
    open_file(path);
    // O_DIRECT takes whole blocks only.
    if (direct_ && bytes_ != stride_) {
      for (int i = 0; i < threads; ++i) {
        staging_.emplace_back(static_cast<char*>(std::aligned_alloc(kAlign, stride_)));
        if (!staging_.back()) throw std::bad_alloc();
        std::memset(staging_.back().get(), 0, stride_);
      }
    }
    for (int i = 0; i < threads; ++i) {
      char* const staging = staging_.empty() ? nullptr : staging_[i].get();
      workers_.emplace_back([this, staging] { work(staging); });
    }
  }
  ~DiskFile() { close_file(); }
  DiskFile(const DiskFile&) = delete;
  DiskFile& operator=(const DiskFile&) = delete;

  bool direct() const { return direct_; }
  bool reserved() const { return reserved_; }
  int fd() const { return fd_; }

  // Starts to copy the record's bytes between the file and memory, which stays the caller's and
  // must stay as it is until the ticket comes out of `poll`.
  int64_t start(bool write, int64_t record, uintptr_t address) {
    if (record < 0 || record >= static_cast<int64_t>(sums_.size())) {
      throw std::invalid_argument("DiskFile: no record " + std::to_string(record));
    }
    if (direct_ && bytes_ == stride_ && address % kAlign != 0) {
      throw std::invalid_argument("DiskFile: memory must lie at a multiple of 4096");
    }
    const std::lock_guard lock(mutex_);
    if (fd_ < 0) throw std::invalid_argument("DiskFile: closed");
    // Sequences wait for reads, nobody waits for writes.
    queues_[write].push_back({++tickets_, write, record, reinterpret_cast<char*>(address)});
    ++pending_;
    changed_.notify_one();
    return tickets_;
  }

  // (ticket, error) of all that ended since the last call; with `wait`, of at least one if there is
  // any. Errors: 0 none, > 0 errno, -1 the file is too short, -2 the checksum differs.
  std::vector<std::pair<int64_t, int>> poll(bool wait) {
    std::unique_lock lock(mutex_);
    if (wait) ended_.wait(lock, [&] { return !results_.empty() || pending_ == 0; });
    pending_ -= results_.size();
    return std::exchange(results_, {});
  }

  // How many transfers have ended, and the seconds in which any was under way.
  std::pair<int64_t, double> done() {
    const std::lock_guard lock(mutex_);
    Clock::duration busy = busy_;
    if (active_ > 0) busy += Clock::now() - busy_since_;
    return {done_, std::chrono::duration<double>(busy).count()};
  }

  void close_file() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

 private:
  struct Job {
    int64_t ticket;
    bool write;
    int64_t record;
    char* address;
  };

  void open_file(const std::string& path) {
    const int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC;
    fd_ = open(path.c_str(), flags | O_DIRECT, 0600);
    direct_ = fd_ >= 0;
    if (fd_ < 0 && errno == EINVAL) {
      unlink(path.c_str());  // some file systems make the file before they refuse the flag
      fd_ = open(path.c_str(), flags, 0600);
    }
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), path);
    unlink(path.c_str());
    const off_t size = static_cast<off_t>(stride_ * sums_.size());
    // Blocks taken now: writes then run beside each other, and a full disk is found out here.
    reserved_ = fallocate(fd_, 0, 0, size) == 0;
    if (!reserved_ && (errno != EOPNOTSUPP || ftruncate(fd_, size) != 0)) {
      const int error = errno;
      close(fd_);
      fd_ = -1;
      throw std::system_error(error, std::generic_category(), path);
    }
    if (direct_) {
      // Accepted at open does not mean supported.
      const std::unique_ptr<char, Free> block(
          static_cast<char*>(std::aligned_alloc(kAlign, kAlign)));
      std::memset(block.get(), 0, kAlign);
      if (pwrite(fd_, block.get(), kAlign, 0) < 0 && errno == EINVAL) {
        direct_ = false;
        fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) & ~O_DIRECT);
      }
    }
  }

  void work(char* staging) {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stop_ || !queues_[0].empty() || !queues_[1].empty(); });
      if (stop_) return;
      auto& queue = queues_[queues_[0].empty()];
      const Job job = queue.front();
      queue.pop_front();
      if (active_++ == 0) busy_since_ = Clock::now();
      lock.unlock();
      const int error = job.write ? write(job, staging) : read(job, staging);
      lock.lock();
      ++done_;
      if (--active_ == 0) busy_ += Clock::now() - busy_since_;
      results_.emplace_back(job.ticket, error);
      ended_.notify_all();
    }
  }

  int write(const Job& job, char* staging) {
    if (staging) std::memcpy(staging, job.address, bytes_);
    const char* from = staging ? staging : job.address;
    sums_[job.record] = checksum(from, bytes_, job.record);
    size_t done = 0;
    const size_t size = staging ? stride_ : bytes_;
    while (done < size) {
      const ssize_t n = pwrite(fd_, from + done, size - done, offset(job) + done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return n < 0 ? errno : ENOSPC;
      done += n;
    }
    return 0;
  }

  int read(const Job& job, char* staging) {
    char* const to = staging ? staging : job.address;
    const size_t size = staging ? stride_ : bytes_;
    size_t done = 0;
    while (done < bytes_) {
      const ssize_t n = pread(fd_, to + done, size - done, offset(job) + done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return errno;
      if (n == 0) return kShort;
      done += n;
    }
    if (checksum(to, bytes_, job.record) != sums_[job.record]) return kCorrupt;
    if (staging) std::memcpy(job.address, staging, bytes_);
    return 0;
  }

  off_t offset(const Job& job) const { return static_cast<off_t>(job.record * stride_); }

  size_t bytes_, stride_;
  std::vector<uint64_t> sums_;
  int fd_ = -1;
  bool direct_ = false, reserved_ = false, stop_ = false;
  std::mutex mutex_;
  std::condition_variable changed_, ended_;
  std::deque<Job> queues_[2];  // reads, writes
  std::vector<std::pair<int64_t, int>> results_;
  int64_t tickets_ = 0, done_ = 0;
  int active_ = 0;
  Clock::time_point busy_since_{};
  Clock::duration busy_{0};
  size_t pending_ = 0;
  std::vector<std::unique_ptr<char, Free>> staging_;
  std::vector<std::thread> workers_;
};

}  // namespace

}  // namespace torch_pd

void bind_disk_file(py::module_& m) {
  using namespace torch_pd;
  py::class_<DiskFile>(m, "DiskFile")
      .def(py::init<const std::string&, size_t, int64_t, int>(), py::arg("path"),
           py::arg("record_bytes"), py::arg("num_records"), py::arg("threads"))
      .def_property_readonly("direct", &DiskFile::direct)
      .def_property_readonly("reserved", &DiskFile::reserved)
      .def_property_readonly("fd", &DiskFile::fd)
      .def_property_readonly("done", &DiskFile::done)
      .def("start", &DiskFile::start, py::arg("write"), py::arg("record"), py::arg("address"))
      .def("poll", &DiskFile::poll, py::arg("wait") = false,
           py::call_guard<py::gil_scoped_release>())
      .def("close", &DiskFile::close_file, py::call_guard<py::gil_scoped_release>());
}
