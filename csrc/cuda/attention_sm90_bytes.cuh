// Pages of bytes for the wgmma prefill kernel (attention_sm90.cuh). One warp of its loading
// warpgroup has the copy engine bring them, as they are, to a ring of slots in shared memory; all
// four of its warps write them from there, as the bfloat16 numbers that they stand for, to the
// tiles that wgmma reads. Scales go beside them: keys' are factors of scores, values' of weights.
// (cp.async instead of the copy engine is slow here: the fence that shows a tile to wgmma waits for
// every copy in flight.)
#pragma once

#include "attention_sm90_load.cuh"

namespace torch_pd {

// Half tiles (K or V) of all items of this block in the order in which they are used: K of the
// first tile, then K of the next before V of each. Tiles go from the last to the first.
template <typename Traits>
struct Sm90Halves {
  const PrefillArgs& p;
  Sm90Items items;
  Sm90Work w;
  int32_t k, v;      // the next ones
  bool done, fresh;  // fresh: the next half tile is the first of its item

  __device__ __forceinline__ void enter() {
    const int32_t i = items.next();
    done = i < 0;
    if (done) return;
    w = read_work<Traits>(p, i);
    k = v = w.stop_tile - 1;
    fresh = true;
  }
  __device__ __forceinline__ bool of_k() const { return k >= w.first_tile && k >= v - 1; }
  __device__ __forceinline__ int32_t tile() const { return of_k() ? k : v; }
  __device__ __forceinline__ void advance() {
    fresh = false;
    if (of_k()) {
      --k;
    } else if (--v < w.first_tile) {
      enter();
    }
  }
};

// What a thread of the loading warpgroup knows of the scales of its key of a tile: read two tiles
// ahead (the page) and one (the scales).
template <typename Traits>
struct Sm90Scales {
  const AttentionArgs& a;
  int thread;
  int32_t entry;
  float k, v;

  __device__ __forceinline__ void find(const Sm90Work& w, int32_t n) {
    const int32_t key = n * Traits::kKeys + thread;
    entry = -1;
    if (n < w.first_tile || thread >= Traits::kKeys || key < w.item.q.begin || key >= w.stop_key) {
      return;
    }
    entry = a.tables[w.item.seq * a.table_stride + (key >> a.block_shift)];
  }
  // A key that no query sees, or of a bad page, has scale 0: its bytes may be anything.
  __device__ __forceinline__ void read(const Sm90Work& w, int32_t n) {
    k = v = 0.0f;
    if (static_cast<uint32_t>(entry) >= static_cast<uint32_t>(a.num_pages)) return;
    const int in_page = (n * Traits::kKeys + thread) & ((1 << a.block_shift) - 1);
    k = a.k_scale[entry * a.ks_page + in_page * int64_t{a.ks_token} + w.head];
    v = a.v_scale[entry * a.vs_page + in_page * int64_t{a.vs_token} + w.head];
  }
};

// Bytes 0 and 2, 1 and 3 of `x` as pairs of bfloat16, exact.
template <int STORED>
__device__ __forceinline__ ptx::Halves bytes_to_bfloat16(uint32_t x) {
  const auto both = [](uint32_t y, uint32_t z, auto op) {
    const __nv_bfloat162 r =
        op(reinterpret_cast<const __nv_bfloat162&>(y), reinterpret_cast<const __nv_bfloat162&>(z));
    return reinterpret_cast<const uint32_t&>(r);
  };
  if constexpr (STORED == kInt8) {
    // 128 + the low seven bits, less 128 or, if the sign bit is set, 256.
    const auto number = [&](uint32_t y) {
      return both(y & 0x007f007fu | 0x43004300u, y & 0x00800080u | 0x43004300u,
                  [](auto u, auto w) { return __hsub2(u, w); });
    };
    return {number(x), number(x >> 8)};
  } else {
    // As ptx::float8_to_halves; three bits of exponent count from 2^-126 here, in float16 from
    // 2^-14.
    constexpr uint32_t kMagnitude = 0x03f803f8u, kUnit = 0x77807780u;  // 2^112
    const uint32_t signs = x & 0x80808080u;
    const auto times = [](auto u, auto w) { return __hmul2(u, w); };
    return {both(ptx::select_bits(x << 3, signs << 8, kMagnitude), kUnit, times),
            both(ptx::select_bits(x >> 5, signs, kMagnitude), kUnit, times)};
  }
}

// A half tile in the hands of a thread: one column of 16 bytes of some keys.
template <typename Traits>
struct Sm90Bytes {
  static constexpr int kThreads = 128, kChunks = Traits::D / 16;
  static constexpr int kStep = kThreads / kChunks;       // keys from one to the next
  static constexpr int kPasses = Traits::kKeys / kStep;  // keys

  int thread;
  uint4 x[kPasses];

  __device__ __forceinline__ void read(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      x[i] = ptx::load_shared16(slot + (i * kThreads + thread) * 16);
    }
  }
  __device__ __forceinline__ void write(uint32_t tile) const {
    static_assert(kStep % 8 == 0);  // so all keys of a thread are swizzled alike
    const int column = thread % kChunks, key = thread / kChunks;
    const uint32_t row = tile + column / 4 * Traits::kKVBlock + key * 128;
    // The lanes of every second 64 columns write their second 16 bytes first: eight lanes that
    // write at once then touch all banks.
    const bool swapped = column / 4 % 2 != 0;
    const uint32_t first = row + ((column % 4 * 2 + swapped) ^ key % 8) * 16, second = first ^ 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint4 low = widen(x[i].x, x[i].y), high = widen(x[i].z, x[i].w);
      const uint4 one = swapped ? high : low, other = swapped ? low : high;
      ptx::store_shared16(first + i * (kStep * 128), one);
      ptx::store_shared16(second + i * (kStep * 128), other);
    }
  }

 private:
  __device__ __forceinline__ static uint4 widen(uint32_t x, uint32_t y) {
    const ptx::Halves a = bytes_to_bfloat16<Traits::kStored>(x),
                      b = bytes_to_bfloat16<Traits::kStored>(y);
    return make_uint4(__byte_perm(a.even, a.odd, 0x5410), __byte_perm(a.even, a.odd, 0x7632),
                      __byte_perm(b.even, b.odd, 0x5410), __byte_perm(b.even, b.odd, 0x7632));
  }
};

// What the loading warpgroup does: 128 threads.
template <typename Traits>
__device__ __forceinline__ void load_bytes(const Sm90Args& args, uint32_t memory,
                                           const Sm90Barriers<Traits>& barriers, Sm90Items items,
                                           int thread) {
  const PrefillArgs& p = args.p;
  const int lane = thread % 32;
  Sm90Halves<Traits> next{p, items};
  next.enter();
  // The first warp asks for half tiles, kSlots - 1 ahead.
  Sm90Halves<Traits> asked = next;
  Ring ask{0, 1}, slots, k_ring{0, 1}, v_ring{0, 1};  // parity 1: the first pass does not wait
  int32_t entry = -1;  // of this lane's piece of the half tile to ask for
  const auto find = [&] {
    if (asked.done) return;
    const Sm90Loader<Traits> loader{p, asked.w, lane};
    entry = loader.entry_of(asked.tile());
  };
  const auto ask_next = [&] {
    if (asked.done) return;
    const Sm90Loader<Traits> loader{p, asked.w, lane};
    const bool of_k = asked.of_k();
    const int32_t page = loader.checked(entry, of_k);
    ptx::barrier_wait(barriers.slot_empty(ask.stage), ask.parity);
    loader.load_bytes(of_k ? args.k : args.v,
                      memory + Traits::kSlotsAt + ask.stage * Traits::kSlotBytes,
                      barriers.slot_full(ask.stage), asked.tile(), page);
    ask.template advance<Traits::kSlots>();
    asked.advance();
    find();
  };
  if (thread < 32) {
    find();
#pragma unroll 1
    for (int i = 0; i < Traits::kSlots - 1; ++i) ask_next();
  }
  Sm90Scales<Traits> scales{p.a, thread};
  Sm90Bytes<Traits> bytes{thread};
  int scale_slot = 0;
  uint32_t q_parity = 1;
#pragma unroll 1
  while (!next.done) {
    if (thread < 32) ask_next();
    ptx::barrier_wait(barriers.slot_full(slots.stage), slots.parity);
    bytes.read(memory + Traits::kSlotsAt + slots.stage * Traits::kSlotBytes);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(barriers.slot_empty(slots.stage));
    slots.template advance<Traits::kSlots>();
    if (next.of_k()) {
      if (next.fresh) {
        scales.find(next.w, next.k);
        scales.read(next.w, next.k);
        scales.find(next.w, next.k - 1);
      }
      ptx::barrier_wait(barriers.k_empty(k_ring.stage), k_ring.parity);
      if (thread < Traits::kKeys) {
        const uint32_t at =
            memory + Traits::kScales + scale_slot * Traits::kScaleBytes + thread * 4;
        ptx::store_shared4(at, scales.k);
        ptx::store_shared4(at + Traits::kKeys * 4, scales.v);
      }
      scale_slot = scale_slot + 1 == Traits::kScaleSlots ? 0 : scale_slot + 1;
      scales.read(next.w, next.k - 1);
      scales.find(next.w, next.k - 2);
      bytes.write(memory + Traits::kK + k_ring.stage * Traits::kTileBytes);
      ptx::async_proxy_fence();
      ptx::barrier_arrive(barriers.k_full(k_ring.stage));
      k_ring.template advance<Traits::kStages>();
    } else {
      ptx::barrier_wait(barriers.v_empty(v_ring.stage), v_ring.parity);
      bytes.write(memory + Traits::kV + v_ring.stage * Traits::kTileBytes);
      ptx::async_proxy_fence();
      ptx::barrier_arrive(barriers.v_full(v_ring.stage));
      v_ring.template advance<Traits::kStages>();
    }
    if (next.fresh) {  // the item's queries, once those of the item before are not needed
      ptx::barrier_wait(barriers.q_empty(), q_parity);
      load_queries<Traits>(p.a, next.w, memory + Traits::kQ, thread, 128);
      ptx::cp_async_wait<0>();
      ptx::async_proxy_fence();
      ptx::barrier_arrive(barriers.q_full());
      q_parity ^= 1;
    }
    next.advance();
  }
}

}  // namespace torch_pd
