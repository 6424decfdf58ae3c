// Board: where the ranks of one host agree, in shared memory. See torch_pd/board.py for its
// meaning.
//
// The vote is one 64-bit word: ready bits of the ranks (0-15), a failure bit (16) and the epoch
// (32-63). Whoever sets the last ready bit commits in the same compare-and-swap: epoch + 1, no bit
// set. A rank takes its bit back only in the epoch that it voted in, so nobody withdraws after the
// commit. Rows and flags lie in the ranks' own slots, written before the bit (release) and read
// after the commit (acquire). They are kept twice, by the epoch's parity: a fast rank may vote
// again while a slow one still reads, but cannot be two commits ahead, for it needs the slow one's
// vote. (Reading them only after the commit is also what makes a withdrawal and a new vote with
// other rows harmless.)
//
// The memory is an anonymous file (memfd) that the other ranks open through /proc/PID/fd while the
// creator lives: it has no name in /dev/shm, so nothing is left behind whatever dies when.
#include <fcntl.h>
#include <linux/futex.h>
#include <pybind11/stl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/bindings.h"

namespace py = pybind11;

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr int kMaxRanks = 16;
constexpr uint64_t kReadyBits = 0xffff;
constexpr uint64_t kFailed = uint64_t{1} << 16;
constexpr int kEpochShift = 32;
constexpr int kCallShift = 40;  // queue word: call number (24 bits), next index (40 bits)
constexpr uint64_t kNextBits = (uint64_t{1} << kCallShift) - 1;
constexpr uint64_t kMagic = 0x7470645f626f6172;  // "tpd_boar"
constexpr size_t kTextBytes = 4096;
constexpr milliseconds kLookAfterPeers{100};

static_assert(std::atomic<uint64_t>::is_always_lock_free);

// What one rank writes; nobody else does.
struct alignas(128) Slot {
  std::atomic<int64_t> pid;         // 0: not attached yet
  std::atomic<uint64_t> born;       // start time of that process, in ticks since boot
  std::atomic<uint32_t> left;       // it said goodbye
  std::atomic<uint32_t> text_size;  // bytes of its error, 0: none
  std::atomic<int64_t> running;     // requests it works on
  std::atomic<uint64_t> key;        // digest and number of its present call
  std::atomic<int64_t> rows[2];
  std::atomic<uint64_t> flags[2];
  char text[kTextBytes];
};

struct Shared {
  std::atomic<uint64_t> magic;
  int64_t world;
  alignas(128) std::atomic<uint64_t> word;
  alignas(128) std::atomic<uint32_t> bell;  // futex: rung at every commit and failure
  std::atomic<uint32_t> sleepers;
  alignas(128) std::atomic<uint64_t> queue;
  Slot slots[kMaxRanks];
};

[[noreturn]] void throw_errno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

struct ProcessState {
  bool alive;
  uint64_t born;
};

// Of a process that has ended but was not waited for (a zombie), `alive` is false as well.
ProcessState look_at(int64_t pid) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%lld/stat", static_cast<long long>(pid));
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    // Anything but "no such process" (too many open files, ...) says nothing about the process.
    return {errno != ENOENT && errno != ESRCH, 0};
  }
  char text[1024];
  const ssize_t size = ::read(fd, text, sizeof text - 1);
  ::close(fd);
  if (size <= 0) return {false, 0};
  text[size] = 0;
  const char* after = std::strrchr(text, ')');  // the name before it may hold anything
  if (after == nullptr || after[1] == 0) return {false, 0};
  const char state = after[2];
  const char* at = after + 2;
  for (int field = 3; field < 22 && at != nullptr; ++field) {
    at = std::strchr(at, ' ');
    if (at != nullptr) ++at;
  }
  const uint64_t born = at == nullptr ? 0 : std::strtoull(at, nullptr, 10);
  return {state != 'Z' && state != 'X' && state != 'x', born};
}

int usable_cpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

enum class Status { kCommitted, kTimeout, kLost, kFailed };

class Board {
 public:
  Board(const std::string& name, int rank, int world) : rank_(rank), world_(world) {
    if (world < 1 || world > kMaxRanks) {
      throw std::invalid_argument("a board is for 1 to " + std::to_string(kMaxRanks) +
                                  " ranks, got " + std::to_string(world));
    }
    if (rank < 0 || rank >= world) {
      throw std::invalid_argument("rank must be in [0, " + std::to_string(world) + "), got " +
                                  std::to_string(rank));
    }
    // Spinning takes a core from whoever is waited for if there are not enough of them.
    spin_ = microseconds(usable_cpus() > 2 * world ? 200 : 0);
    name.empty() ? create() : attach(name);
    try {
      Slot& mine = shared_->slots[rank_];
      mine.born.store(look_at(::getpid()).born);
      int64_t nobody = 0;
      if (!mine.pid.compare_exchange_strong(nobody, ::getpid())) {
        throw std::invalid_argument("rank " + std::to_string(rank_) + " of " + name_ +
                                    " is taken by process " + std::to_string(nobody));
      }
    } catch (...) {
      unmap();
      throw;
    }
  }

  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  ~Board() {
    release_guard();
    unmap();
  }

  const std::string& name() const { return name_; }

  // Ranks that have attached, as a bit mask. The creator drops the file's name when all have.
  uint64_t attached() {
    uint64_t mask = 0;
    for (int r = 0; r < world_; ++r) mask |= uint64_t{slot(r).pid.load() != 0} << r;
    if (fd_ >= 0 && mask == all()) {
      ::close(fd_);
      fd_ = -1;
    }
    return mask;
  }

  // The vote.

  void ready(int64_t rows, uint64_t flags) {
    if (voted_) throw std::logic_error("this rank has voted already");
    if (rows < 0) throw std::invalid_argument("rows must be >= 0, got " + std::to_string(rows));
    uint64_t word = shared_->word.load(std::memory_order_acquire);
    epoch_ = static_cast<uint32_t>(word >> kEpochShift);  // stays: no commit without this rank
    Slot& mine = shared_->slots[rank_];
    mine.rows[epoch_ & 1].store(rows, std::memory_order_relaxed);
    mine.flags[epoch_ & 1].store(flags, std::memory_order_relaxed);
    voted_ = true;
    uint64_t next;
    bool last;
    do {
      next = word | bit();
      last = (next & kReadyBits) == all() && !(word & kFailed);
      if (last) next = uint64_t{uint32_t(epoch_ + 1)} << kEpochShift;
    } while (!shared_->word.compare_exchange_weak(word, next));
    if (last) ring();
  }

  bool withdraw() {
    if (!voted_) throw std::logic_error("this rank has not voted");
    uint64_t word = shared_->word.load(std::memory_order_acquire);
    do {
      if (committed(word)) return false;
    } while (!shared_->word.compare_exchange_weak(word, word & ~bit()));
    voted_ = false;
    return true;
  }

  bool committed() const {
    if (!voted_) throw std::logic_error("this rank has not voted");
    return committed(shared_->word.load(std::memory_order_acquire));
  }

  // Epoch, rows and flags of the commit that `ready` led to; ends this rank's vote.
  std::tuple<uint32_t, std::vector<int64_t>, uint64_t> commit() {
    if (!committed()) throw std::logic_error("there is no commit yet");
    voted_ = false;
    std::vector<int64_t> rows(world_);
    uint64_t flags = 0;
    for (int r = 0; r < world_; ++r) {
      rows[r] = slot(r).rows[epoch_ & 1].load(std::memory_order_relaxed);
      flags |= slot(r).flags[epoch_ & 1].load(std::memory_order_relaxed);
    }
    return {epoch_ + 1, rows, flags};
  }

  // Waits at most `limit`; with kLost and kFailed comes the rank.
  std::pair<Status, int> wait(Clock::duration limit) {
    if (!voted_) throw std::logic_error("this rank has not voted");
    const auto start = Clock::now();
    const auto end = start + limit;
    while (Clock::now() - start < spin_) {
      if (committed(shared_->word.load(std::memory_order_acquire))) return {Status::kCommitted, 0};
      for (int i = 0; i < 32; ++i) relax();
    }
    auto look = Clock::now() + kLookAfterPeers;
    for (;;) {
      shared_->sleepers.fetch_add(1);
      const uint32_t rung = shared_->bell.load();
      const uint64_t word = shared_->word.load();
      const auto now = Clock::now();
      const bool done = committed(word) || (word & kFailed) || now >= end;
      if (!done) nap(rung, std::min(look, end) - now);
      shared_->sleepers.fetch_sub(1);
      if (committed(word)) return {Status::kCommitted, 0};
      if (word & kFailed) return {Status::kFailed, failed()};
      if (done) return {Status::kTimeout, 0};
      if (Clock::now() >= look) {
        look = Clock::now() + kLookAfterPeers;
        const int gone = missing(true);
        // It may have cast the last vote before it went.
        if (gone >= 0 && !committed(shared_->word.load())) return {Status::kLost, gone};
      }
    }
  }

  // Failure.

  // The lowest attached rank whose process is gone (or has left, if asked); -1: none.
  int missing(bool left_too) const {
    for (int r = 0; r < world_; ++r) {
      const int64_t pid = slot(r).pid.load();
      if (pid == 0 || r == rank_) continue;
      if (slot(r).left.load()) {
        if (left_too) return r;
        continue;
      }
      const ProcessState state = look_at(pid);
      if (!state.alive || (state.born != 0 && state.born != slot(r).born.load())) return r;
    }
    return -1;
  }

  void fail(const std::string& text) {
    Slot& mine = shared_->slots[rank_];
    const size_t size = std::min(text.size(), kTextBytes);
    if (mine.text_size.load() == 0) {
      std::memcpy(mine.text, text.data(), size);
      mine.text_size.store(std::max<uint32_t>(1, size), std::memory_order_release);
    }
    shared_->word.fetch_or(kFailed);
    ring();
  }

  // The lowest rank that failed; -1: none.
  int failed() const {
    for (int r = 0; r < world_; ++r) {
      if (slot(r).text_size.load(std::memory_order_acquire)) return r;
    }
    return -1;
  }

  py::bytes error(int rank) const {
    const Slot& of = slot(rank);
    return py::bytes(of.text, of.text_size.load(std::memory_order_acquire));
  }

  int64_t pid(int rank) const { return slot(rank).pid.load(); }

  void leave() {
    shared_->slots[rank_].left.store(1);
    release_guard();
  }

  // A thread that ends this process `grace` after a peer died or failed, with a line on stderr,
  // even where the main thread hangs in a collective that the peer will never join.
  void guard(double grace_s) {
    if (guard_.joinable()) throw std::logic_error("the guard stands already");
    guard_ = std::thread([this, grace = microseconds(int64_t(grace_s * 1e6))] {
      std::unique_lock<std::mutex> lock(mutex_);
      std::string why;
      while (why.empty()) {
        if (dismissed_.wait_for(lock, kLookAfterPeers, [this] { return off_duty_; })) return;
        const int bad = failed(), gone = missing(false);
        if (bad >= 0 && bad != rank_) {
          why = "rank " + std::to_string(bad) +
                " failed: " + std::string(slot(bad).text, slot(bad).text_size.load());
        } else if (gone >= 0) {
          why = "rank " + std::to_string(gone) + " (process " + std::to_string(pid(gone)) +
                ") has died";
        }
      }
      if (dismissed_.wait_for(lock, grace, [this] { return off_duty_; })) return;
      why = "torch_pd: " + why + "; rank " + std::to_string(rank_) + " ends too\n";
      // Nothing else can be done if stderr is gone.
      if (::write(STDERR_FILENO, why.data(), why.size()) < 0) ::_exit(1);
      ::_exit(1);
    });
  }

  // The queue.

  // Enters call number `call` of `total` requests. Returns a rank that is in the same call with
  // another key, -1 if there is none: of two that differ, at least the later one sees it.
  int open(uint32_t call, int64_t total, uint64_t digest) {
    if (total < 0 || uint64_t(total) > kNextBits) {
      throw std::invalid_argument("total must be in [0, 2**40), got " + std::to_string(total));
    }
    call_ = call & 0xffffff;
    total_ = total;
    const uint64_t key = digest << 24 | call_;
    shared_->slots[rank_].running.store(0);
    shared_->slots[rank_].key.store(key);
    uint64_t queue = shared_->queue.load();
    // The first one to come resets the queue; one that comes after the call has ended finds a later
    // number, and nothing left to do. Numbers wrap: the difference counts.
    while (int32_t((call_ - uint32_t(queue >> kCallShift)) << 8) > 0) {
      if (shared_->queue.compare_exchange_weak(queue, uint64_t{call_} << kCallShift)) break;
    }
    for (int r = 0; r < world_; ++r) {
      const uint64_t other = slot(r).key.load();
      if (other != key && (other & 0xffffff) == call_) return r;
    }
    return -1;
  }

  int64_t left_in_queue() const {
    const uint64_t queue = shared_->queue.load();
    if (queue >> kCallShift != call_) return 0;
    return total_ - int64_t(queue & kNextBits);
  }

  std::pair<int64_t, int64_t> take(int64_t want, int64_t among) {
    std::atomic<int64_t>& mine = shared_->slots[rank_].running;
    uint64_t queue = shared_->queue.load();
    int64_t count;
    do {
      const int64_t left = total_ - int64_t(queue & kNextBits);
      if (queue >> kCallShift != call_ || left <= 0) return {total_, total_};
      const int64_t share = (left + running() + among - 1) / among;
      count = std::min({want, left, share - mine.load()});
      if (count <= 0) return {total_, total_};
    } while (!shared_->queue.compare_exchange_weak(queue, queue + uint64_t(count)));
    mine.fetch_add(count);
    const int64_t first = int64_t(queue & kNextBits);
    return {first, first + count};
  }

  // Leaves nothing in the queue of this rank's call.
  void drain() {
    uint64_t queue = shared_->queue.load();
    do {
      if (queue >> kCallShift != call_) return;
    } while (!shared_->queue.compare_exchange_weak(queue, uint64_t{call_} << kCallShift | total_));
  }

  void set_running(int64_t count) { shared_->slots[rank_].running.store(count); }

  int64_t running() const {
    int64_t sum = 0;
    for (int r = 0; r < world_; ++r) sum += slot(r).running.load();
    return sum;
  }

 private:
  const Slot& slot(int rank) const {
    if (rank < 0 || rank >= world_) throw std::out_of_range("rank " + std::to_string(rank));
    return shared_->slots[rank];
  }

  uint64_t bit() const { return uint64_t{1} << rank_; }
  uint64_t all() const { return (uint64_t{1} << world_) - 1; }
  bool committed(uint64_t word) const {
    return voted_ && static_cast<uint32_t>(word >> kEpochShift) != epoch_;
  }

  void create() {
    fd_ = ::memfd_create("torch_pd_board", MFD_CLOEXEC);
    if (fd_ < 0) throw_errno("memfd_create");
    if (::ftruncate(fd_, sizeof(Shared)) != 0) {
      ::close(fd_);
      throw_errno("ftruncate");
    }
    map(fd_);
    name_ = "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(fd_);
    // The file is all zeros, which is the first state of everything else.
    shared_->world = world_;
    shared_->magic.store(kMagic, std::memory_order_release);
  }

  void attach(const std::string& name) {
    name_ = name;
    const int fd = ::open(name.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) throw_errno("opening the board " + name);
    struct stat info;
    if (::fstat(fd, &info) != 0 || info.st_size != off_t(sizeof(Shared))) {
      ::close(fd);
      throw std::invalid_argument(name + " is not a board");
    }
    map(fd);
    ::close(fd);
    if (shared_->magic.load(std::memory_order_acquire) != kMagic || shared_->world != world_) {
      unmap();
      throw std::invalid_argument(name + " is not a board of " + std::to_string(world_) + " ranks");
    }
  }

  void map(int fd) {
    void* at = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
      const int why = errno;
      ::close(fd);
      fd_ = -1;
      errno = why;
      throw_errno("mapping the board");
    }
    shared_ = static_cast<Shared*>(at);
  }

  void unmap() {
    if (shared_ != nullptr) ::munmap(shared_, sizeof(Shared));
    if (fd_ >= 0) ::close(fd_);
    shared_ = nullptr;
    fd_ = -1;
  }

  void ring() {
    shared_->bell.fetch_add(1);
    if (shared_->sleepers.load() != 0) {
      ::syscall(SYS_futex, &shared_->bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
  }

  void nap(uint32_t rung, Clock::duration span) {
    const auto ns = std::max<int64_t>(0, std::chrono::nanoseconds(span).count());
    const timespec until{time_t(ns / 1000000000), long(ns % 1000000000)};
    ::syscall(SYS_futex, &shared_->bell, FUTEX_WAIT, rung, &until, nullptr, 0);
  }

  void release_guard() {
    if (!guard_.joinable()) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      off_duty_ = true;
    }
    dismissed_.notify_all();
    guard_.join();
  }

  const int rank_, world_;
  std::string name_;
  int fd_ = -1;
  Shared* shared_ = nullptr;
  microseconds spin_{0};
  bool voted_ = false;
  uint32_t epoch_ = 0;
  uint32_t call_ = 0;
  int64_t total_ = 0;
  std::thread guard_;
  std::mutex mutex_;
  std::condition_variable dismissed_;
  bool off_duty_ = false;
};

// As `Board.wait`, but looks for Ctrl-C now and then.
std::pair<Status, int> wait(Board& board, double timeout_s) {
  const auto end = Clock::now() + microseconds(int64_t(std::clamp(timeout_s, 0.0, 1e9) * 1e6));
  for (;;) {
    std::pair<Status, int> result;
    {
      py::gil_scoped_release release;
      const auto slice = std::min<Clock::duration>(end - Clock::now(), milliseconds(200));
      result = board.wait(std::max(slice, Clock::duration::zero()));
    }
    if (result.first != Status::kTimeout || Clock::now() >= end) return result;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

}  // namespace

void bind_board(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {
      const py::object args = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, args.ptr());
    }
  });
  py::enum_<Status>(m, "BoardStatus")
      .value("COMMITTED", Status::kCommitted)
      .value("TIMEOUT", Status::kTimeout)
      .value("LOST", Status::kLost)
      .value("FAILED", Status::kFailed);
  py::class_<Board>(m, "Board")
      .def(py::init<const std::string&, int, int>(), py::arg("name"), py::arg("rank"),
           py::arg("world"))
      .def_property_readonly("name", &Board::name)
      .def("attached", &Board::attached)
      .def("ready", &Board::ready, py::arg("rows"), py::arg("flags"))
      .def("withdraw", &Board::withdraw)
      .def("committed", [](const Board& board) { return board.committed(); })
      .def("commit", &Board::commit)
      .def("wait", &wait, py::arg("timeout_s"))
      .def("missing", &Board::missing, py::arg("left_too"))
      .def("fail", &Board::fail, py::arg("text"))
      .def("failed", &Board::failed)
      .def("error", &Board::error, py::arg("rank"))
      .def("pid", &Board::pid, py::arg("rank"))
      .def("leave", &Board::leave, py::call_guard<py::gil_scoped_release>())
      .def("guard", &Board::guard, py::arg("grace_s"))
      .def("open", &Board::open, py::arg("call"), py::arg("total"), py::arg("digest"))
      .def("left", &Board::left_in_queue)
      .def("take", &Board::take, py::arg("want"), py::arg("among"))
      .def("drain", &Board::drain)
      .def("set_running", &Board::set_running, py::arg("count"))
      .def("running", &Board::running);
}
