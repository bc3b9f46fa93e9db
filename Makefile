# Two commands do all set-up: `make demo` and `make test`. Nothing is installed outside .venv.
SHELL := /bin/sh
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); if [ $$n -gt 8 ]; then echo 8; else echo $$n; fi)
ARGS ?=

# The first interpreter that can run everything (3.11, for TRL), else the first that can run the library (3.10).
at_least = $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, $(1)))' 2>/dev/null && echo $$p && break; done)
PYTHON ?= $(or $(call at_least,11),$(call at_least,10))

SOURCES := pyproject.toml setup.py setup_build.py setup_cuda.py constraints.txt $(shell find rlkernels csrc -type f \
	\( -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name py.typed \))

.PHONY: docs docs-version demo test test-triton matrix mutants fuzz fuzz-sanitized bench bench-suite gpu lint wheel release-check clean trl-python
.NOTPARALLEL:

demo: trl-python $(VENV)/.installed
	$(VENV)/bin/rlkernels demo $(ARGS)

# Before the install: the resolver would answer with a page.
trl-python: $(VENV)/bin/python
	@$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make demo: TRL needs Python >= 3.11; install one and run: make clean && make demo PYTHON=python3.11 (the library itself runs on 3.10)"; exit 1; }

# The proofs of the Triton kernels with the newest version, then the suite; with ARGS a part of the suite alone.
# One torch thread per worker: the suite is many small cases, and two workers with two threads each would fight for two cores.
TRITON ?= 3.9.0 3.6.0
test: $(VENV)/.installed
ifneq ($(strip $(ARGS)),)
	@echo "make test: ARGS select from the suite; the proofs of the Triton kernels are left out (make test-triton)"
else ifneq ($(shell uname -s),Linux)
	@echo "make test: Triton has no wheels for $(shell uname -s); the proofs of its kernels are left out"
else
	@$(MAKE) --no-print-directory test-triton TRITON=$(firstword $(TRITON))
endif
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(JOBS) --dist worksteal $(ARGS)

# Triton lies beside the environment, not in it: TRL would choose other paths. Its interpreter is switched on for a whole process.
test-triton: $(VENV)/.installed
	@for v in $(TRITON); do \
		[ -d .triton/$$v ] || $(PIP) install -q --no-deps --target .triton/$$v triton==$$v $$([ $$v = 3.6.0 ] && echo 'numpy<2.4') || exit 1; \
		echo "Triton $$v"; export PYTHONPATH=$(CURDIR)/.triton/$$v OMP_NUM_THREADS=1 TRITON_CACHE_DIR=$(CURDIR)/.triton/cache-$$v; \
		TRITON_INTERPRET=1 $(VENV)/bin/pytest -q -n $(JOBS) tests/backends/triton_backend/interpreted $(ARGS) || exit 1; \
		$(VENV)/bin/pytest -q -n $(JOBS) tests/backends/triton_backend/compiled $(ARGS) || exit 1; \
	done

# Very long, and gigabytes of downloads: the core of the suite under the oldest and the newest versions; docs/versions.md holds the last result.
matrix:
	$(PYTHON) tests/repository/matrix.py $(ARGS)

# Long: plants faults in every backend, one at a time, and counts how many the suite notices.
mutants: $(VENV)/.installed
	@v=$(firstword $(TRITON)); [ -d .triton/$$v ] || $(PIP) install -q --no-deps --target .triton/$$v triton==$$v
	$(VENV)/bin/python tests/repository/mutation $(ARGS)

# Long: 59000 random calls, valid ones against float64 torch and hostile ones, five minutes on two cores; then threads and races.
FUZZ := OMP_NUM_THREADS=1 $(VENV)/bin/python tests/fuzz --jobs $(JOBS)
fuzz: $(VENV)/.installed
	$(FUZZ) --seeds 0 1000 $(ARGS)
	$(VENV)/bin/python -X faulthandler tests/fuzz/threads.py 60
	$(VENV)/bin/python -X faulthandler tests/fuzz/races.py 60

# The same with the native module under AddressSanitizer and UBSan, after a look whether these find a read out of bounds that is planted.
fuzz-sanitized: $(VENV)/.installed
	$(FUZZ) --sanitized --self-check --kind valid --case gae --seeds 0 40
	$(FUZZ) --sanitized --seeds 0 1000 $(ARGS)

bench: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks --device cpu $(ARGS)

bench-suite: $(VENV)/.installed
	$(VENV)/bin/pytest benchmarks/suite --benchmark-only -p no:xdist $(ARGS)

# On a CUDA machine whose Python has torch and Triton already: no virtual environment, no network, under nine minutes.
gpu:
	$(PYTHON) benchmarks/gpu_machine/run.py $(ARGS)

# .clang-format holds the style, .clang-format-ignore what a program prints.
NATIVE = $(shell find csrc tests -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))
lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)
	$(VENV)/bin/mypy

# A source distribution and the wheel made from it, in dist/: for every GPU where RLKERNELS_CUDA=1 asks for that module. The wheel is then used alone, in an environment of its own.
wheel: $(VENV)/bin/python
	rm -rf dist build/wheel
	$(VENV)/bin/python -m venv build/wheel
	build/wheel/bin/python -m pip --disable-pip-version-check install -q build
	RLKERNELS_CPU=1 RLKERNELS_CUDA=$${RLKERNELS_CUDA:-0} RLKERNELS_CUDA_ARCHS=all build/wheel/bin/python -I -m build --outdir dist .
	build/wheel/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt dist/*.whl
	build/wheel/bin/python -I tests/repository/wheel_import.py

# Most of an hour: a wheel in a fresh environment without a compiler, the core of the suite there, pages, tables and figures of the same sources.
release-check:
	$(PYTHON) tests/repository/release_check.py $(ARGS)

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "make: no Python >= 3.10 on PATH; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is older than Python 3.10"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: $(PYTHON) has no venv module; install it first (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The wheel is built in isolation (pybind11 and ninja only); the constraint file keeps torch at the version that was tested.
$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	@extras=demo,bench,test; $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || extras=bench,test; \
		echo "installing rlkernels[$$extras] into $(VENV) (the first time this downloads torch)"; \
		$(PIP) install --progress-bar off -c constraints.txt ".[$$extras]"
	@touch $@

# The site of docs/, strict: a dead link, or a page that the navigation lacks, is an error. Its tools lie beside the environment, not in it.
DOCS_ENV := .docs-venv
docs: $(DOCS_ENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build -q
	@echo "site/index.html holds the documentation; $(DOCS_ENV)/bin/mkdocs serve shows it while you write"

# The same in a folder with the documentation of other versions, and a selector on every page. Any web server shows the folder.
SITES ?= sites
docs-version: $(DOCS_ENV)/.installed
	$(DOCS_ENV)/bin/python docs/publish.py $(SITES)

$(DOCS_ENV)/.installed: pyproject.toml constraints.txt
	@[ -x $(DOCS_ENV)/bin/python ] || $(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]' latex2mathml ruff
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_ENV) site sites .triton build dist rlkernels.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f rlkernels/_cpu*.so rlkernels/_cuda*.so rlkernels/_cuda.ptxas.txt rlkernels/_*.build.log
