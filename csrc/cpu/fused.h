// Row kernels of csrc/cpu/isa/fused.cpp. Arguments are checked; rows [begin, end) are done.
#pragma once

#include "../params/fused.h"
#include "../params/paged_kv.h"
#include "../params/rope_write_kv.h"
#include "isa.h"

namespace torch_pd {

// Floats of scratch memory that one thread needs: cos, sin and one head.
inline int64_t rope_scratch(const RopeWriteKV& p) { return 2 * p.rope_dim + p.head_dim; }

// A vector's inline functions do not belong into isa/ sources: lists come as pointer and count.
TPD_ISA(void, rope_write_kv_rows,
        (const RopeWriteKV& p, const int64_t* shard_heads, int64_t shards, float* scratch,
         int64_t begin, int64_t end))
TPD_ISA(void, rms_norm_rows, (const RmsNorm& p, int64_t begin, int64_t end))
TPD_ISA(void, gated_act_rows,
        (const GatedAct& p, const int64_t* shard_widths, int64_t shards, int64_t begin,
         int64_t end))

// write_kv into a cache of bytes, and one head out of it.
TPD_ISA(void, write_byte_rows, (const WriteKV& p, int64_t begin, int64_t end))
TPD_ISA(void, read_bytes,
        (const void* from, ScalarType stored, float scale, void* to, ScalarType dtype,
         int64_t count))

}  // namespace torch_pd
