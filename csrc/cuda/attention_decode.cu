// Decode attention of sequences with up to 8 packed query rows; which tile takes a call.
#include "attention_decode_launch.cuh"

namespace torch_pd {

void launch_decode(AttentionCall call, int max_rows) {
  call.args.min_rows = 0;
  call.args.max_rows = max_rows;
  if (max_rows <= 8) {
    decode_rows<8>(call, max_rows);
  } else {
    launch_decode_tall(call, max_rows);
  }
}

}  // namespace torch_pd
