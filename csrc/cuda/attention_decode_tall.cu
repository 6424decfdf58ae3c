// Decode attention of sequences with more than 8 packed query rows, in tiles of 16.
#include "attention_decode_launch.cuh"

namespace torch_pd {

void launch_decode_tall(const AttentionCall& call, int max_rows) {
  decode_rows<16>(call, max_rows);
}

}  // namespace torch_pd
