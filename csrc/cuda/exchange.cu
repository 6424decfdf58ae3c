// exchange: each rank's messages to all others in one kernel, by stores into mapped inboxes.
//
// An inbox is a block of GPU memory that the other ranks of the host map (torch_pd/peer.py); its
// owner reads it, the others write. A message moves in lines of 128 bytes: 7 words of 16 bytes and
// one that holds the number of the exchange, written by 8 neighbouring threads with one
// instruction. The receiver loads lines the same way until the number is right; then the 7 words
// are those of this exchange, as a line is written and read in one piece (NCCL's LL128 protocol
// rests on the same). So nothing is fenced, and a message costs one trip over the link.
//
// Block b of every rank's grid deals with block b of the others only, and has a count of its own
// exchanges, its own lines and two sets of them, used in turn. A set may be overwritten when its
// reader has begun the exchange after it: every block tells that to all its peers first, and
// waits for their word before it writes. The word is one exchange old and so has come already.
// Blocks start in order, so the lowest unfinished one runs on every rank or will, whatever else is
// on the GPUs: no grid is too large for a deadlock to follow.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "overlap.cuh"
#include "vec.cuh"

namespace torch_pd {

namespace {

constexpr int kMaxRanks = 8, kBlocks = 128, kSets = 2;
constexpr int kLine = 128, kWords = 7;  // bytes; words of 16 bytes beside the number
constexpr int kThreads = 512, kLinesAtOnce = kThreads / 8;
constexpr int kHeld = 4;

// At the start of an inbox; zero at first. Lines follow: [kSets][ranks][kBlocks][lines].
struct Header {
  uint64_t begun[kMaxRanks][kBlocks];  // by the others: their block began this exchange
  uint64_t count[kBlocks];             // exchanges that block b has done
  int32_t lost;                        // a peer did not come: nothing is waited for any more
};
constexpr int64_t kHeader = 16384;
static_assert(sizeof(Header) <= kHeader);

// A matrix in the caller's tensor, sent or received as one row of units after the other.
struct Part {
  int64_t start, stride;  // units
  FastDiv width{1};
  int units = 0;
};

struct ExchangeArgs {
  const void* x;
  void* out;
  char* inboxes[kMaxRanks];  // as this rank maps them
  Part sends[kMaxRanks], receives[kMaxRanks];
  int32_t* errors;
  int64_t timeout;        // nanoseconds
  int rank, size, lines;  // lines of a block
};

template <typename Unit>
constexpr int kUnits = 16 / sizeof(Unit);

template <typename Unit>
__device__ __forceinline__ int64_t place_of(const Part& part, int unit) {
  const uint32_t row = part.width.div(unit);
  return part.start + row * part.stride + (unit - static_cast<int64_t>(row) * part.width.divisor);
}

template <typename Unit>
__device__ __forceinline__ int words_of(const Part& part) {
  return (part.units + kUnits<Unit> - 1) / kUnits<Unit>;
}

// A word beyond the part is zero.
template <typename Unit>
__device__ __forceinline__ uint4 load_word(const void* from, const Part& part, int word) {
  uint4 value{0, 0, 0, 0};
  Unit* const units = reinterpret_cast<Unit*>(&value);
#pragma unroll
  for (int i = 0; i < kUnits<Unit>; ++i) {
    const int unit = word * kUnits<Unit> + i;
    if (unit < part.units) {
      units[i] = static_cast<const Unit*>(from)[place_of<Unit>(part, unit)];
    }
  }
  return value;
}

template <typename Unit>
__device__ __forceinline__ void store_word(void* to, const Part& part, int word, uint4 value) {
  const Unit* const units = reinterpret_cast<const Unit*>(&value);
#pragma unroll
  for (int i = 0; i < kUnits<Unit>; ++i) {
    const int unit = word * kUnits<Unit> + i;
    if (unit < part.units) static_cast<Unit*>(to)[place_of<Unit>(part, unit)] = units[i];
  }
}

// Seen by and from other GPUs, each access once and as it stands. A line must move in one
// instruction: a warp meets before its loads or stores (__syncwarp), and which of its lines are
// there is a predicate, so that no branch parts its threads in between.
__device__ __forceinline__ void load_line(uint4& v, const char* from, bool there) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
      "@p ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(there))
      : "memory");
}
__device__ __forceinline__ void store_line(char* to, uint4 v, bool there) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
      "@p st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(there))
      : "memory");
}
__device__ __forceinline__ uint64_t load_begun(const uint64_t* from) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_begun(uint64_t* to, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(v) : "memory");
}
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t v;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(v));
  return v;
}

// The waits of a warp, which all its threads make together.
class Wait {
 public:
  __device__ Wait(const ExchangeArgs& a, Header* header)
      : a_(a), header_(header), lost_(*static_cast<volatile int32_t*>(&header->lost) != 0) {
    lost_ = __any_sync(~0u, lost_);
  }

  // A peer is lost: nothing may be written or used.
  __device__ bool lost() const { return lost_; }

  // Whether to look again; `missing` is the peer that this thread waits for, -1: none.
  __device__ bool more(int missing) {
    const uint32_t waiting = __ballot_sync(~0u, missing >= 0);
    if (waiting == 0 || lost_) return false;
    if (++looks_ % 1024 != 0) return true;
    const int peer = __shfl_sync(~0u, missing, __ffs(waiting) - 1);
    bool late = *static_cast<volatile int32_t*>(&header_->lost) != 0;
    const uint64_t now = nanoseconds();
    if (since_ == 0) since_ = now;
    if (now - since_ > static_cast<uint64_t>(a_.timeout) && threadIdx.x % 32 == 0) {
      late = true;
      if (atomicExch(&header_->lost, 1) == 0) raise_flag(a_.errors, kExchange, kLostPeer, peer);
    }
    lost_ = __any_sync(~0u, late);
    return !lost_;
  }

 private:
  const ExchangeArgs& a_;
  Header* header_;
  uint64_t since_ = 0;
  uint32_t looks_ = 0;
  bool lost_;
};

// A block's share of the lines of a part.
struct Share {
  int begin, end;
};
__device__ __forceinline__ Share share_of(int words) {
  const int lines = (words + kWords - 1) / kWords;
  const int each = (lines + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int begin = static_cast<int>(blockIdx.x) * each;
  return {begin, min(lines, begin + each)};
}

// T: what is summed, in the order of the ranks; void: everything is only moved.
template <typename Unit, typename T>
__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ ExchangeArgs a) {
  constexpr bool kSum = !std::is_void_v<T>;
  after_previous();
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32, place = lane % 8;
  const int first = thread / 8;  // line of this thread among those that the block moves at once
  Header* const mine = reinterpret_cast<Header*>(a.inboxes[a.rank]);
  const uint64_t number = mine->count[block] + 1;
  const uint32_t mark = static_cast<uint32_t>(number % 0xffffffffu) + 1;  // never 0
  const auto box = [&](int owner, int sender) {
    const int64_t set = static_cast<int64_t>(number % kSets) * a.size + sender;
    return a.inboxes[owner] + kHeader + (set * kBlocks + block) * a.lines * kLine + place * 16;
  };
  Wait wait(a, mine);

  const bool peer = lane < a.size && lane != a.rank;
  if (peer && thread < 32 && !wait.lost()) {
    Header* const theirs = reinterpret_cast<Header*>(a.inboxes[lane]);
    store_begun(&theirs->begun[a.rank][block], number);
  }
  bool behind;
  do {
    behind = peer && load_begun(&mine->begun[lane][block]) + (kSets - 1) < number;
  } while (wait.more(behind ? lane : -1));

  if (!wait.lost()) {
    for (int i = 1; i < a.size; ++i) {
      const int to = a.rank + i < a.size ? a.rank + i : a.rank + i - a.size;
      const Part& part = a.sends[to];
      const int words = words_of<Unit>(part);
      const Share share = share_of(words);
      char* const lines = box(to, a.rank);
      // A warp's threads stay together: a line is stored by 8 threads at once.
      for (int base = share.begin + first - first % 4; base < share.end;
           base += kLinesAtOnce * kHeld) {
        uint4 held[kHeld];
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          const int line = base + first % 4 + u * kLinesAtOnce;
          held[u] = uint4{mark, mark, mark, mark};
          if (place < kWords) {
            const int word = line < share.end ? line * kWords + place : words;
            held[u] = load_word<Unit>(a.x, part, word);
          }
        }
        __syncwarp();
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          const int line = base + first % 4 + u * kLinesAtOnce;
          char* const to_line = lines + int64_t{line - share.begin} * kLine;
          store_line(to_line, held[u], line < share.end);
        }
      }
    }
  }

  if constexpr (!kSum) {
    const Part &from = a.sends[a.rank], &to = a.receives[a.rank];
    const int step = static_cast<int>(gridDim.x) * kThreads;
    for (int word = block * kThreads + thread; word < words_of<Unit>(from); word += step) {
      store_word<Unit>(a.out, to, word, load_word<Unit>(a.x, from, word));
    }
    for (int i = 1; i < a.size; ++i) {
      const int from_rank = a.rank >= i ? a.rank - i : a.rank - i + a.size;
      const Part& part = a.receives[from_rank];
      const int words = words_of<Unit>(part);
      const Share share = share_of(words);
      const char* const lines = box(a.rank, from_rank);
      for (int base = share.begin + first - first % 4; base < share.end;
           base += kLinesAtOnce * kHeld) {
        uint4 held[kHeld];
#pragma unroll
        for (int u = 0; u < kHeld; ++u) held[u] = uint4{mark, mark, mark, mark};
        bool missing;
        do {
          missing = false;
          __syncwarp();
#pragma unroll
          for (int u = 0; u < kHeld; ++u) {
            const int line = base + first % 4 + u * kLinesAtOnce;
            load_line(held[u], lines + int64_t{line - share.begin} * kLine, line < share.end);
          }
#pragma unroll
          for (int u = 0; u < kHeld; ++u) missing |= place == kWords && held[u].x != mark;
        } while (wait.more(missing ? from_rank : -1));
        if (wait.lost()) break;
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          const int line = base + first % 4 + u * kLinesAtOnce;
          if (line < share.end && place < kWords && line * kWords + place < words) {
            store_word<Unit>(a.out, part, line * kWords + place, held[u]);
          }
        }
      }
    }
  } else {
    constexpr int kItems = 16 / sizeof(T);
    int some = a.rank;
    for (int from = 0; from < a.size; ++from) {
      if (a.receives[from].units > 0) some = from;
    }
    const Part& part = a.receives[some];
    const int words = words_of<Unit>(part);
    const Share share = share_of(words);
    for (int base = share.begin + first - first % 4; base < share.end; base += kLinesAtOnce) {
      const int line = base + first % 4;
      const int word = place < kWords && line < share.end ? line * kWords + place : words;
      uint4 held[kMaxRanks];
#pragma unroll
      for (int from = 0; from < kMaxRanks; ++from) {
        held[from] = uint4{mark, mark, mark, mark};
        if (from == a.rank && a.receives[from].units > 0) {
          held[from] = load_word<Unit>(a.x, a.sends[from], word);
        }
      }
      int missing;
      do {
        missing = -1;
        __syncwarp();
#pragma unroll
        for (int from = 0; from < kMaxRanks; ++from) {
          if (from >= a.size || from == a.rank || a.receives[from].units == 0) continue;
          const char* const from_line = box(a.rank, from) + int64_t{line - share.begin} * kLine;
          load_line(held[from], from_line, line < share.end);
          if (place == kWords && held[from].x != mark) missing = from;
        }
      } while (wait.more(missing));
      if (wait.lost()) break;
      float sum[kItems] = {};
#pragma unroll
      for (int from = 0; from < kMaxRanks; ++from) {
        if (from >= a.size || a.receives[from].units == 0) continue;
        float x[kItems];
        widen(reinterpret_cast<const Vec<T, kItems>&>(held[from]), x);
#pragma unroll
        for (int e = 0; e < kItems; ++e) sum[e] += x[e];
      }
      if (word < words) {
        const Vec<T, kItems> total = narrow<T, kItems>(sum);
        store_word<Unit>(a.out, part, word, reinterpret_cast<const uint4&>(total));
      }
    }
  }
  __syncthreads();
  if (thread == 0) mine->count[block] = number;
}

// --- host ---

struct Given {
  int64_t start, rows, width, stride;  // elements
  bool empty() const { return rows == 0 || width == 0; }
};

std::vector<Given> read_parts(const char* op, const char* name, const std::vector<int64_t>& values,
                              size_t size, const char* of, const Tensor& t) {
  TPD_CHECK(op, values.size() == size * 4, name, " must have 4 values for each of ", size,
            " ranks, got ", values.size());
  std::vector<Given> parts;
  for (size_t i = 0; i < size; ++i) {
    Given part{values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]};
    TPD_CHECK(op, part.start >= 0 && part.rows >= 0 && part.width >= 0 && part.stride >= 0, name,
              " must not be negative");
    if (part.empty()) part = {0, 0, 0, 0};
    const int64_t end = part.empty() ? 0 : part.start + (part.rows - 1) * part.stride + part.width;
    TPD_CHECK(op, end <= t.numel(), name, " of rank ", i, " end at element ", end, ", ", of,
              " has ", t.numel());
    if (part.rows == 1 || part.stride == part.width) {
      part = {part.start, 1, part.rows * part.width, part.rows * part.width};
    }
    TPD_CHECK(op, part.rows * part.width < (int64_t{1} << 30), name, " of rank ", i,
              " have too many elements");
    parts.push_back(part);
  }
  return parts;
}

template <typename Unit>
void set_parts(Part* to, const std::vector<Given>& parts, int64_t item) {
  // `item` bytes an element; several units, or part of one.
  const auto units = [&](int64_t elements) {
    return elements * item / static_cast<int64_t>(sizeof(Unit));
  };
  for (size_t i = 0; i < parts.size(); ++i) {
    const Given& part = parts[i];
    to[i].start = units(part.start), to[i].stride = units(part.stride);
    to[i].units = static_cast<int>(units(part.rows * part.width));
    if (!part.empty()) to[i].width = FastDiv(units(part.width));
  }
}

template <typename Unit, typename T>
void start_exchange(ExchangeArgs& a, const std::vector<Given>& sends,
                    const std::vector<Given>& receives, int64_t item, int64_t blocks,
                    const Launch& launch) {
  set_parts<Unit>(a.sends, sends, item);
  set_parts<Unit>(a.receives, receives, item);
  start_overlapped(launch, exchange_kernel<Unit, T>, blocks, kThreads, a);
}

void exchange(const Tensor& x, const Tensor& out, const Tensor& inbox,
              const std::vector<int64_t>& inboxes, int64_t rank, const std::vector<int64_t>& sends,
              const std::vector<int64_t>& receives, bool add, int64_t blocks, double timeout_s) {
  const char* op = "exchange";
  const auto size = static_cast<int64_t>(inboxes.size());
  TPD_CHECK(op, size >= 2 && size <= kMaxRanks, "is among 2 to ", kMaxRanks, " ranks, got ", size);
  TPD_CHECK(op, rank >= 0 && rank < size, "rank must be in 0 to ", size - 1, ", got ", rank);
  TPD_CHECK(op, blocks >= 1 && blocks <= kBlocks, "blocks must be in 1 to ", kBlocks, ", got ",
            blocks);
  TPD_CHECK(op, inbox.is_cuda() && inbox.scalar_type() == ScalarType::Byte && inbox.is_contiguous(),
            "inbox must be uint8 on a GPU");
  TPD_CHECK(op, x.is_contiguous() && out.is_contiguous(), "x and out must be contiguous");
  for (const Tensor& t : {x, out}) {
    TPD_CHECK(op, t.is_cuda() && t.get_device_index() == inbox.get_device_index(),
              "x and out must be on the GPU of inbox, got ", device_name(t));
  }
  TPD_CHECK(op, x.scalar_type() == out.scalar_type(), "x and out differ in dtype");
  const auto item = static_cast<int64_t>(x.element_size());
  TPD_CHECK(op, item == 2 || item == 4 || item == 8, "elements must be 2, 4 or 8 bytes, got ",
            dtype_name(x.scalar_type()));
  const std::vector<Given> from = read_parts(op, "sends", sends, inboxes.size(), "x", x);
  const std::vector<Given> to = read_parts(op, "receives", receives, inboxes.size(), "out", out);

  ExchangeArgs a{x.data_ptr(), out.data_ptr()};
  a.rank = static_cast<int>(rank), a.size = static_cast<int>(size);
  a.timeout = static_cast<int64_t>(timeout_s * 1e9);
  const int64_t lines = (inbox.numel() - kHeader) / (int64_t{kSets} * size * kBlocks * kLine);
  a.lines = static_cast<int>(lines);
  for (int64_t r = 0; r < size; ++r) a.inboxes[r] = reinterpret_cast<char*>(inboxes[r]);
  TPD_CHECK(op, a.inboxes[rank] == inbox.data_ptr(), "inboxes do not hold inbox at ", rank);
  bool wide = aligned(a.x, 16) && aligned(a.out, 16);
  for (const auto* parts : {&from, &to}) {
    for (const Given& part : *parts) {
      const int64_t words = ceil_div(part.rows * part.width * item, 16);
      const int64_t each = ceil_div(ceil_div(words, kWords), blocks);
      TPD_CHECK(op, each <= lines, "a message of ", part.rows * part.width * item, " bytes in ",
                blocks, " blocks; the inbox has room for ", lines * kWords * 16 * blocks);
      for (const int64_t value : {part.start, part.width, part.stride}) {
        wide = wide && value * item % 16 == 0;
      }
    }
  }
  const Launch launch(op, inbox);
  a.errors = error_flag(op, launch.device);
  const auto start = [&](auto* type, auto* unit) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Unit = std::remove_pointer_t<decltype(unit)>;
    if (wide) {
      start_exchange<uint4, T>(a, from, to, item, blocks, launch);
    } else {
      start_exchange<Unit, T>(a, from, to, item, blocks, launch);
    }
  };
  uint16_t* const two = nullptr;
  uint32_t* const four = nullptr;
  if (!add) {
    void* const none = nullptr;
    return item == 2 ? start(none, two) : start(none, four);
  }
  switch (x.scalar_type()) {
    case ScalarType::Float: return start(static_cast<float*>(nullptr), four);
    case ScalarType::BFloat16: return start(static_cast<__nv_bfloat16*>(nullptr), two);
    case ScalarType::Half: return start(static_cast<__half*>(nullptr), two);
    default: fail(op, dtype_name(x.scalar_type()), " cannot be summed");
  }
}

}  // namespace

}  // namespace torch_pd

STABLE_TORCH_LIBRARY_IMPL(torch_pd, CUDA, m) { m.impl("exchange", TORCH_BOX(&torch_pd::exchange)); }
