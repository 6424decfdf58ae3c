#pragma once
#include <pybind11/pybind11.h>

void bind_board(pybind11::module_& m);
