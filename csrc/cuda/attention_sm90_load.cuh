// Loading for the wgmma prefill kernel (attention_sm90.cuh): its work, shared memory and copies.
#pragma once

#include "attention_prefill.cuh"
#include "bulk.cuh"

namespace torch_pd {

constexpr int kSm90Rows = 128;
constexpr int kPageKeys = 16;  // keys that one copy brings; a page has at least so many

struct Sm90Args {
  PrefillArgs p;
  CUtensorMap k, v;  // [pages, block_size, heads, D], in boxes of 16 keys x 64 columns
};

template <typename T_, int D_, int STORED>
struct Sm90Traits {
  using T = T_;
  static constexpr int D = D_, kStored = STORED;
  static constexpr bool kBytes = STORED != kAsQuery;
  static constexpr int kKeys = D > 128 ? 64 : 128;  // of a tile
  static constexpr int kStages = D < 128 ? 4 : 2;
  static constexpr int kColumnBlocks = D / 64;     // of 128 bytes
  static constexpr int kQBlock = kSm90Rows * 128;  // bytes of a column block
  static constexpr int kKVBlock = kKeys * 128;
  static constexpr int kTileBytes = kColumnBlocks * kKVBlock;
  static constexpr int kQ = 0;
  static constexpr int kK = kColumnBlocks * kQBlock;
  static constexpr int kV = kK + kStages * kTileBytes;
  // Pages of bytes: half tiles (K or V) as they are stored; a tile's scales, which are in use until
  // its weights are made, a tile longer than its keys.
  static constexpr int kSlotsAt = kV + kStages * kTileBytes;
  static constexpr int kSlots = !kBytes ? 0 : D > 128 ? 2 : 3;
  static constexpr int kSlotBytes = kKeys * D;
  static constexpr int kScales = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kScaleSlots = kBytes ? kStages + 1 : 0;
  static constexpr int kScaleBytes = 2 * kKeys * 4;
  static constexpr int kBarriers = kScales + kScaleSlots * kScaleBytes;
  static constexpr int kShared = kBarriers + 8 * (2 + 4 * kStages + 2 * kSlots) + 1024;  // to align
  static constexpr int kThreads = 384;
  // Of a loading and of a computing thread: three warpgroups have 168 each.
  static constexpr int kLoadRegisters = kBytes ? 88 : D > 128 ? 40 : 56;
  static constexpr int kRegisters = (3 * 168 - kLoadRegisters) / 2;
  // Of K or V of a tile.
  static constexpr int kCopies = kKeys / kPageKeys * (kBytes ? 1 : kColumnBlocks);
  static_assert(kCopies <= 32 && kPageKeys == kTileKeys && kShared <= 227 * 1024);
};

// Shared-memory addresses of the barriers.
template <typename Traits>
struct Sm90Barriers {
  uint32_t base;
  __device__ uint32_t q_full() const { return base; }
  __device__ uint32_t q_empty() const { return base + 8; }
  __device__ uint32_t k_full(int stage) const { return base + 16 + stage * 32; }
  __device__ uint32_t k_empty(int stage) const { return base + 24 + stage * 32; }
  __device__ uint32_t v_full(int stage) const { return base + 32 + stage * 32; }
  __device__ uint32_t v_empty(int stage) const { return base + 40 + stage * 32; }
  __device__ uint32_t slot_full(int s) const { return base + 16 + Traits::kStages * 32 + s * 16; }
  __device__ uint32_t slot_empty(int s) const { return slot_full(s) + 8; }
};

// Position in a ring of stages; `parity` is that of the phase to wait for.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  template <int STAGES>
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// The items of this block: to and fro over the list, heaviest first, so that every block gets about
// the same sum.
struct Sm90Items {
  int32_t count, round = 0;
  __device__ __forceinline__ int32_t next() {
    const int32_t blocks = gridDim.x, at = blockIdx.x;
    const int32_t i = round * blocks + (round % 2 == 0 ? at : blocks - 1 - at);
    ++round;
    return i < count ? i : -1;
  }
};

struct Sm90Work {
  PrefillItem item;
  int head, row0, rows;
  int32_t first_tile, stop_tile, stop_key;
};
template <typename Traits>
__device__ __forceinline__ Sm90Work read_work(const PrefillArgs& p, int32_t index) {
  Sm90Work w;
  const int32_t at = index / p.a.num_kv_heads;
  w.head = index - at * p.a.num_kv_heads;
  w.item = p.items[at];
  w.row0 = w.item.tile * kSm90Rows;
  w.rows = w.item.q.q_len * p.a.group;
  const KeyRange keys = key_range(p.a, w.item.q, w.row0, min(w.row0 + kSm90Rows, w.rows));
  w.first_tile = keys.first / Traits::kKeys;
  w.stop_tile = (keys.stop + Traits::kKeys - 1) / Traits::kKeys;
  w.stop_key = keys.stop;
  return w;
}

// Copies the keys (or values) of one tile: a lane per page and column block. A page that no query
// sees, or that does not exist, is read as zeros, from past the end of the tensor.
template <typename Traits>
struct Sm90Loader {
  const PrefillArgs& p;
  const Sm90Work& w;
  int lane;

  __device__ __forceinline__ int32_t key_of(int32_t n) const {
    return n * Traits::kKeys + lane % (Traits::kKeys / kPageKeys) * kPageKeys;
  }
  // The block table entry of this lane's page of tile `n`, -1 if no query sees it.
  __device__ __forceinline__ int32_t entry_of(int32_t n) const {
    const int32_t key = key_of(n);
    if (n < w.first_tile || key >= w.stop_key || key + kPageKeys <= w.item.q.begin) return -1;
    return p.a.tables[w.item.seq * p.a.table_stride + (key >> p.a.block_shift)];
  }
  // An entry if it is a page, or -1.
  __device__ __forceinline__ int32_t checked(int32_t entry, bool reports) const {
    if (static_cast<uint32_t>(entry) < static_cast<uint32_t>(p.a.num_pages)) return entry;
    if (entry != -1 && reports && lane < Traits::kKeys / kPageKeys && w.head == 0) {
      const bool other = static_cast<uint32_t>(entry) >> kPlaceShift != 0;
      raise_flag(p.a.errors, kPagedAttention, other ? kBadPlace : kBadPage, entry);
    }
    return -1;
  }
  __device__ __forceinline__ int32_t page_of(int32_t n) const { return checked(entry_of(n), true); }

  __device__ __forceinline__ void copy(const CUtensorMap& map, uint32_t tile, uint32_t barrier,
                                       int32_t key, int32_t page) const {
    const int block = lane / (Traits::kKeys / kPageKeys);
    const uint32_t to =
        tile + block * Traits::kKVBlock + lane % (Traits::kKeys / kPageKeys) * (kPageKeys * 128);
    ptx::bulk_load(to, &map, barrier, block * 64, w.head, key & ((1 << p.a.block_shift) - 1),
                   page >= 0 ? page : p.a.num_pages);
  }

  // Keys of tile `n`, whose pages are `page`.
  __device__ __forceinline__ void load_keys(const CUtensorMap& map, uint32_t tile, uint32_t barrier,
                                            int32_t n, int32_t page) const {
    if (lane == 0) ptx::barrier_arrive_expect(barrier, Traits::kTileBytes);
    __syncwarp();
    if (lane < Traits::kCopies) copy(map, tile, barrier, key_of(n), page);
  }

  // Half a tile of bytes.
  __device__ __forceinline__ void load_bytes(const CUtensorMap& map, uint32_t slot,
                                             uint32_t barrier, int32_t n, int32_t page) const {
    if (lane == 0) ptx::barrier_arrive_expect(barrier, Traits::kSlotBytes);
    __syncwarp();
    if (lane < Traits::kCopies) {
      ptx::bulk_load(slot + lane * (kPageKeys * Traits::D), &map, barrier, 0, w.head,
                     key_of(n) & ((1 << p.a.block_shift) - 1), page >= 0 ? page : p.a.num_pages);
    }
  }

  // A page of which only some tokens hold values is copied by the lanes instead, zeros for the
  // others: an unused token may hold NaN, which 0 * v would keep.
  __device__ __forceinline__ void load_values(const CUtensorMap& map, uint32_t tile,
                                              uint32_t barrier, int32_t n, int32_t page) const {
    const int32_t key = key_of(n);
    if (lane >= Traits::kCopies) page = -1;
    const bool partial = page >= 0 && (key + kPageKeys > w.item.q.len || key < w.item.q.begin);
    const uint32_t parts = __ballot_sync(~0u, partial);
    for (uint32_t left = parts & ((1u << (Traits::kKeys / kPageKeys)) - 1); left != 0;
         left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      copy_part(tile, source, __shfl_sync(~0u, key, source), __shfl_sync(~0u, page, source));
    }
    if (parts != 0) ptx::async_proxy_fence();
    __syncwarp();
    if (lane == 0) {
      ptx::barrier_arrive_expect(barrier, Traits::kTileBytes - __popc(parts) * (kPageKeys * 128));
    }
    __syncwarp();
    if (lane < Traits::kCopies && !partial) copy(map, tile, barrier, key, page);
  }

 private:
  __device__ __forceinline__ void copy_part(uint32_t tile, int place, int32_t key,
                                            int32_t page) const {
    const AttentionArgs& a = p.a;
    const char* from = a.v + page * a.v_page +
                       (key & ((1 << a.block_shift) - 1)) * static_cast<int64_t>(a.v_token) +
                       w.head * a.v_head;
    constexpr int kChunks = Traits::D / 8;
    for (int i = lane; i < kPageKeys * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool holds = key + row >= w.item.q.begin && key + row < w.item.q.len;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (holds) {
        x = *reinterpret_cast<const uint4*>(from + row * static_cast<int64_t>(a.v_token) +
                                            chunk * 16);
      }
      const int r = place * kPageKeys + row;
      ptx::store_shared16(tile + chunk / 8 * Traits::kKVBlock + r * 128 + (chunk % 8 ^ r % 8) * 16,
                          x);
    }
  }
};

// Query rows of one item into swizzled shared memory, zeros past the last row.
template <typename Traits>
__device__ __forceinline__ void load_queries(const AttentionArgs& a, const Sm90Work& w, uint32_t to,
                                             int thread, int threads) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::D / 8;
  const T* q = static_cast<const T*>(a.q);
  for (int i = thread; i < kSm90Rows * kChunks; i += threads) {
    const int r = i / kChunks, chunk = i % kChunks, row = w.row0 + r;
    const int token = row / a.group, head = w.head * a.group + row - token * a.group;
    const bool valid = row < w.rows;
    const T* from = q + (w.item.q.q_start + token) * a.q_token + head * a.q_head + chunk * 8;
    ptx::cp_async16(to + chunk / 8 * Traits::kQBlock + r * 128 + (chunk % 8 ^ r % 8) * 16,
                    valid ? from : q, valid);
  }
  ptx::cp_async_commit();
}

}  // namespace torch_pd
