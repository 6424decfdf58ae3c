// torch_pd._runtime: stateful objects with threads, streams or handles, for Python. Addresses and
// streams travel as integers; no torch headers. Each part has one file and one bind_... function.
#include "runtime/bindings.h"

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Stateful parts of torch_pd in C++.";
#ifdef TORCH_PD_RUNTIME_CUDA
  m.attr("HAS_CUDA") = true;
#else
  m.attr("HAS_CUDA") = false;
#endif
  bind_board(m);
  bind_host_memory(m);
  bind_migrator(m);
  bind_disk_file(m);
  bind_elastic_memory(m);
  bind_peer_memory(m);
  bind_puller(m);
}
