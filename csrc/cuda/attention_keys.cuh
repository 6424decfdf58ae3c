// Tiles of 16 keys and values in shared memory, as attention with mma.sync reads them, and how
// cp.async brings them there.
#pragma once

#include "attention.cuh"

namespace torch_pd {

constexpr int kTileKeys = 16;  // never more than one page

template <typename T_, int D_, int STORED, int ROWS>
struct TileTraits {
  using T = T_;                                                    // of q and out
  using Mma = std::conditional_t<STORED != kAsQuery, __half, T_>;  // bytes are exact in float16
  static constexpr int D = D_;
  static constexpr int kRows = ROWS, kGroups = ROWS / 8;  // a group is as wide as an mma
  static constexpr bool FP8 = STORED != kAsQuery;         // either kind of bytes
  static __device__ __forceinline__ ptx::Halves to_halves(uint32_t bytes) {
    return STORED == kInt8 ? ptx::int8_to_halves(bytes) : ptx::float8_to_halves(bytes);
  }
  static constexpr int kRowBytes = D * (FP8 ? 1 : 2);
  static constexpr int kChunks = kRowBytes / 16;
  // ldmatrix reads one column of chunks of 8 rows, without bank conflicts: rows of a power of two
  // of chunks follow each other densely, their chunks in another order in each row; others lie an
  // odd number of chunks apart. (Dense: a copy of a row then stays inside one line of 128 bytes of
  // shared memory; one that straddled two would fetch half of its sectors twice.)
  static constexpr bool kSwizzled = (kChunks & (kChunks - 1)) == 0;
  static constexpr int kPitch = (kSwizzled ? kChunks : kChunks | 1) * 16;
  // What row `row` does to the offset of a chunk.
  static __host__ __device__ constexpr int swizzle(int row) {
    return !kSwizzled ? 0 : kChunks < 8 ? row / 2 % kChunks * 16 : row % 8 * 16;
  }
  static constexpr int kTileBytes = kTileKeys * kPitch;  // of K or V
  static constexpr bool kTight = D > 128 && ROWS > 8;    // sums take half of all registers
  static constexpr int kBatch = kTight ? 1 : 4;  // ldmatrix before the first of them is used
  static_assert(D % 16 == 0 && ROWS % 8 == 0 && kChunks >= 4);
};

// Copies one head of K and V of 16 keys at a time to shared memory. What does not depend on the
// keys is worked out once.
template <typename Traits>
struct KeyLoader {
  static constexpr int kChunks = Traits::kChunks;
  static constexpr bool kWhole = 32 % kChunks == 0;  // a lane stays in its column
  static constexpr int kRows = kWhole ? 32 / kChunks : 1;

  const AttentionArgs& a;
  int lane;
  bool reports;
  // Of page 0, token 0: this lane's first copy; its scale (of K: lanes 0 to 15).
  const char *k, *v, *scale;
  uint32_t to;             // of that copy inside a tile
  int64_t scale_page;      // bytes
  int32_t scale_token;     // bytes
  uint32_t scale_to;       // from k_scales
  int32_t k_rows, v_rows;  // bytes from one copy of a lane to the next

  // scales: bytes from k_scales to v_scales.
  __device__ __forceinline__ KeyLoader(const AttentionArgs& a, int head, int lane, bool reports,
                                       int scales)
      : a(a), lane(lane), reports(reports && lane == 0) {
    const int row = kWhole ? lane / kChunks : 0, column = kWhole ? lane % kChunks * 16 : 0;
    k = a.k + int64_t{head} * a.k_head + row * int64_t{a.k_token} + column;
    v = a.v + int64_t{head} * a.v_head + row * int64_t{a.v_token} + column;
    to = row * Traits::kPitch + (column ^ Traits::swizzle(row));
    k_rows = kRows * a.k_token, v_rows = kRows * a.v_token;
    if constexpr (!Traits::kTight) {
      ptx::keep(k), ptx::keep(v), ptx::keep(to), ptx::keep(k_rows), ptx::keep(v_rows);
    }
    if constexpr (Traits::FP8) {
      const bool of_k = lane < 16;
      const int token = lane % 16;
      scale_token = 4 * (of_k ? a.ks_token : a.vs_token);
      scale_page = 4 * (of_k ? a.ks_page : a.vs_page);
      scale_to = token * 4 + (of_k ? 0 : scales);
      scale = reinterpret_cast<const char*>((of_k ? a.k_scale : a.v_scale) + head) +
              token * int64_t{scale_token};
      if constexpr (!Traits::kTight) {
        ptx::keep(scale), ptx::keep(scale_page), ptx::keep(scale_token), ptx::keep(scale_to);
      }
    }
  }

  // The keys from `key` on, which block table entry `entry` holds; keys outside [q.begin, q.len)
  // and of bad pages are filled with zeros (a page's unused tokens may hold NaN). k_scales: [16].
  __device__ __forceinline__ void load(const Sequence& q, int32_t key, int32_t entry, uint32_t keys,
                                       uint32_t values, uint32_t k_scales) const {
    PageAt page{0, 0, false};
    if (key < q.len && key + kTileKeys > q.begin) page = locate_page(a, entry, reports);
    const int first = page.valid ? max(0, q.begin - key) : kTileKeys;
    const int stop = min(kTileKeys, q.len - key);
    const int in_page = key & ((1 << a.block_shift) - 1);
    const char* k_row = k + page.index * a.k_page + page.shift + in_page * int64_t{a.k_token};
    const char* v_row = v + page.index * a.v_page + page.shift + in_page * int64_t{a.v_token};
    if (kWhole && first == 0 && stop == kTileKeys) {  // nearly all tiles
#pragma unroll
      for (int i = 0; i < kTileKeys; i += kRows) {
        // Row i + lane / kChunks: no bit is in both, so neither is one in what they do to a chunk.
        const uint32_t at = (to ^ Traits::swizzle(i)) + i * Traits::kPitch;
        ptx::cp_async16(keys + at, k_row, true);
        ptx::cp_async16(values + at, v_row, true);
        k_row += k_rows, v_row += v_rows;
      }
    } else {
      const int own = kWhole ? lane : 0;
#pragma unroll 1
      for (int c = lane; c < kTileKeys * kChunks; c += 32) {
        // From this lane's first copy on.
        const int row = c / kChunks, down = row - own / kChunks;
        const int column = (c - row * kChunks) * 16, right = column - own % kChunks * 16;
        const bool valid = row >= first && row < stop;
        const uint32_t at = row * Traits::kPitch + (column ^ Traits::swizzle(row));
        ptx::cp_async16(keys + at, valid ? k_row + down * int64_t{a.k_token} + right : a.k, valid);
        ptx::cp_async16(values + at, valid ? v_row + down * int64_t{a.v_token} + right : a.v,
                        valid);
      }
    }
    if constexpr (Traits::FP8) {
      const int row = lane % 16;
      const bool valid = row >= first && row < stop;
      const char* from =
          scale + page.index * scale_page + page.shift + in_page * int64_t{scale_token};
      ptx::cp_async4(k_scales + scale_to, valid ? static_cast<const void*>(from) : a.k_scale,
                     valid);
    }
  }
};

}  // namespace torch_pd
