# make train    GRPO-D training of the embedded Qwen2-VL on the CPU; options in ARGS, e.g. make train ARGS="--task vc"
# make reproduce   the paper's table and figures; what of them in ARGS, e.g. make reproduce ARGS="table1 --seeds 0-2"
# make test     the tests, but for the slow ones; make test-all   all of them
# make faults   what they leave out: kills, full disks, damaged files (half an hour; FAULTS=500 tries ten times as often)
# make soak     long runs, watched for leaks of memory, files, threads and processes; results in docs/results
# make fuzz     whatever files, answers, options and tensors may come: 10,000 cases of each kind (CASES=N: so many)
# make check    lint, format, types
# make wheel    the source distribution and the wheel, in dist/; make wheel-check   the wheel, tried beside torch alone
# make sanitize    the C++ kernel under AddressSanitizer, UBSan and ThreadSanitizer (built aside, in build)
# make compile-check, compile-check-old    every GPU kernel through its compiler, no GPU needed; old: on Triton 3.6.0
# make device-dry-run    benchmarks/device.sh without a GPU, on tiny shapes: does every stage run?
# Each sets up .venv first if it is missing or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help train reproduce test test-all faults fuzz soak check wheel wheel-check sanitize sanitize-threads compile-check compile-check-old device-dry-run format setup clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

setup: $(READY)
	@echo "==> to use it in this shell: source $(BIN)/activate"

# torch comes first: the extension is built against it, and an isolated build would download a second one.
$(READY): $(SOURCES)
	@echo "==> setting up $(VENV) (once; a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools wheel ninja
	@echo "==> torch"
	@$(PIP) torch
	@echo "==> mr1fast, its extension and the development tools"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

reproduce: $(READY)
	@echo "==> python -m mr1fast.reproduce $(or $(ARGS),all)"
	@$(BIN)/python -m mr1fast.reproduce $(or $(ARGS),all)

train: $(READY)
	@echo "==> python -m mr1fast.train $(ARGS)"
	@$(BIN)/python -m mr1fast.train $(ARGS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

test: $(READY)
	@echo "==> pytest without the slow tests, a process for each core (8 at most)"
	@$(PYTEST) -m "not slow and not faults" $(ARGS)

test-all: $(READY)
	@echo "==> pytest, a process for each core (8 at most)"
	@$(PYTEST) -m "not faults" $(ARGS)

# One at a time: each has several processes, and some count seconds.
faults: $(READY)
	@echo "==> pytest: kills, full disks and damaged files"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults $(ARGS)

# One process, whose statistics hypothesis can show; the log has how many cases there were.
FUZZ_LOG := docs/results/fuzz.txt
fuzz: $(READY)
	@echo "==> pytest tests/test_fuzz_*.py; the log goes to $(FUZZ_LOG)"
	@mkdir -p build docs/results
	@FUZZ_CASES=$(or $(CASES),10000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --timeout=0 \
	    --hypothesis-show-statistics tests/test_fuzz_*.py >build/fuzz.log 2>&1; status=$$?; \
	    grep -E '^tests/.*:$$|test cases$$|^(FAILED|ERROR)|^E  |[0-9] (passed|failed).* in ' build/fuzz.log \
	    | tee $(FUZZ_LOG); exit $$status

soak: $(READY)
	@echo "==> python -m benchmarks.soak $(ARGS)"
	@$(BIN)/python -m benchmarks.soak $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p mr1fast
	$(BIN)/mypy benchmarks

wheel: $(READY)
	@echo "==> the source distribution, and from it the wheel"
	@rm -rf dist
	@$(BIN)/python -m build --quiet --no-isolation

# Not compiling what is never imported saves half of the time that installing torch takes.
BARE := build/bare
wheel-check: wheel
	@echo "==> the wheel beside torch alone"
	@rm -rf $(BARE)
	@$(BIN)/python -m venv $(BARE)
	@env -u PYTHONPATH $(BARE)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile \
	    -c constraints.txt dist/*.whl
	@$(BARE)/bin/python -I .ci/check_wheel.py
	@rm -rf $(BARE)

compile-check: $(READY)
	@env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.compile_check
	@$(BIN)/python -m benchmarks.compile_check_cuda || [ $$? -eq 2 ] # 2: no nvcc, which it says

# The oldest Triton that is supported, in an environment of its own: what is clean on the new one may spill on the old.
OLD := .venv-triton36
compile-check-old:
	@test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	@$(OLD)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt torch
	@$(OLD)/bin/python -m pip --disable-pip-version-check install --quiet triton==3.6.0 numpy==2.3.5
	@env -u TRITON_INTERPRET $(OLD)/bin/python -m benchmarks.compile_check

# In .venv312 where there is such an environment (make setup VENV=.venv312 PYTHON=python3.12): machines with a GPU tend to
# have Python 3.12.
device-dry-run: $(READY)
	@rm -rf build/device-dry-run
	@DRY_RUN=1 PYTHON=$(firstword $(wildcard .venv312/bin/python) $(BIN)/python) \
	    bash benchmarks/device.sh build/device-dry-run

# The kernel without Python and torch, in threads: see tests/cpu_threads.cpp. Leaks are looked for here.
THREADS_SOURCES := tests/cpu_threads.cpp csrc/grpo_cpu.cpp csrc/row_kernels.cpp
build/cpu_threads_%: $(THREADS_SOURCES) $(wildcard csrc/*.h)
	@mkdir -p build
	g++ -std=c++20 -O0 -g1 -Icsrc -fsanitize=$* -fno-sanitize-recover=all $(THREADS_SOURCES) -o $@

comma := ,
sanitize-threads: build/cpu_threads_thread build/cpu_threads_address$(comma)undefined
	for program in $^; do ./$$program || exit 1; done

# The tests of the kernel under AddressSanitizer and UBSan. Leaks are not looked for: Python and torch leave much behind on
# purpose. libstdc++ must be there before libasan looks for the functions it replaces, or the first C++ exception aborts.
# One test ends a program by a fault, to see that it would; finding names for the stack of that takes ASan over 5 minutes.
ASAN_LIBRARIES = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so)
sanitize: $(READY) sanitize-threads
	@rm -rf build/sanitize && mkdir -p build/sanitize && git ls-files -z | xargs -0 cp --parents -P -t build/sanitize
	cd build/sanitize && MR1FAST_SANITIZE=address,undefined $(abspath $(BIN)/python) setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$(ASAN_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0:handle_segv=0 PYTHONPATH=. \
	    $(abspath $(BIN)/python) -m pytest -q -p no:cacheprovider -k "cpp and not install" \
	    tests/test_cpp.py tests/test_cpp_values.py tests/test_loss.py tests/test_linear.py tests/test_fuzz_loss.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLD) .venv312 build dist *.egg-info mr1fast/*.so
