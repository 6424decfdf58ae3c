#pragma once
#include <pybind11/pybind11.h>

void bind_board(pybind11::module_& m);
void bind_host_memory(pybind11::module_& m);
void bind_migrator(pybind11::module_& m);
void bind_disk_file(pybind11::module_& m);
void bind_elastic_memory(pybind11::module_& m);
void bind_peer_memory(pybind11::module_& m);
void bind_puller(pybind11::module_& m);
