PYTHON ?= python3
VENV   ?= .venv
# The release that the tests run on. It is installed first, so that pip cannot resolve another build of torch
# when it installs pcfast.
TORCH  ?= torch==2.13.0

# Another release to compile the kernels with: make compile-all TRITON=triton==3.9.0, make ptx TRITON=triton==3.9.0
TRITON ?=
TRITON_FOLDER := .venv-$(subst ==,-,$(TRITON))
WITH_TRITON := $(if $(TRITON),PYTHONPATH=$(CURDIR)/$(TRITON_FOLDER))

VENV_PYTHON := $(VENV)/bin/python
# One stamp per TORCH: asking for another release installs it.
STAMP := $(VENV)/.installed-$(subst =,-,$(subst /,-,$(TORCH)))
# Touched when what the tests need is there, too: training does without.
TESTS := $(VENV)/.installed-tests
# Touched when the kernels were compiled, or left out where there is no compiler for them.
NATIVE := $(VENV)/.native
NATIVE_SOURCES := CMakeLists.txt $(wildcard csrc csrc/* csrc/*/*)

# -qq: errors only; where wheels come from a local folder, pip prints hundreds of harmless warnings.
PIP_INSTALL := $(VENV_PYTHON) -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help train test ptx native fuzz lowest rehearse compile-all lint bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "make TARGET, with TARGET one of:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) TRITON=$(TRITON)'

train: $(STAMP) ## train the default network on digits; results in runs/digits
	@$(VENV)/bin/pcfast train

# One OpenMP thread a worker: with more, the workers fight for the cores and everything is slower.
test: $(NATIVE) ## run the whole test suite
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n 2 -rs
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n 2 -rs tests/kernels

# What kernels execute, and what is deleted one by one, are recorded of the tests' release of triton.
ptx: $(NATIVE) $(if $(TRITON),$(TRITON_FOLDER)/.installed) ## execute every compiled kernel on the CPU (three quarters of an hour)
	@$(WITH_TRITON) OMP_NUM_THREADS=1 $(VENV_PYTHON) tests/ptx/run_full.py
	@$(if $(TRITON),,OMP_NUM_THREADS=1 $(VENV_PYTHON) tests/ptx/kernel_profile.py)
	@$(if $(TRITON),,OMP_NUM_THREADS=1 $(VENV_PYTHON) tests/ptx/mutations.py)

native: $(NATIVE) ## compile the kernels again where their sources have changed

# hypothesis marks its tests.
fuzz: $(NATIVE) ## hand the native entry nonsense for a minute, and draw three times as many random networks
	@PCFAST_FUZZ_SECONDS=60 OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q tests/native/test_fuzzed.py
	@PCFAST_FUZZ_EXAMPLES=3 OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -n 2 -m hypothesis
	@PCFAST_FUZZ_EXAMPLES=3 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -n 2 -m hypothesis tests/kernels

rehearse: $(NATIVE) ## go through bench/on_gpu.sh without a GPU
	@PYTHON=$(abspath $(VENV_PYTHON)) OMP_NUM_THREADS=1 bench/on_gpu.sh .benchmarks/rehearsal --rehearse

# Limits are recorded of the tests' release of triton.
compile-all: $(TESTS) $(if $(TRITON),$(TRITON_FOLDER)/.installed) ## compile every kernel for every chip
	@$(if $(TRITON),,$(VENV_PYTHON) tests/kernels/compilation.py)
	@$(WITH_TRITON) $(VENV_PYTHON) tests/kernels/compilation.py --full
	@$(if $(TRITON),,$(VENV_PYTHON) tests/native/native_compilation.py)

# Warnings of old releases about each other are no errors.
lowest: ## test with the least releases that pyproject.toml declares, once a release
	@$(PYTHON) -m venv .venv-lowest
	@$(PYTHON) tests/lowest.py > .venv-lowest/constraints.txt
	@.venv-lowest/bin/python -m pip install -qq --disable-pip-version-check -c .venv-lowest/constraints.txt -e ".[train,test]"
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 -rs -W default --ignore tests/test_packaging.py

lint: $(TESTS) ## check the style
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

bench: $(NATIVE) ## run the benchmarks; record them with python -m pcfast.bench.report --record
	@$(VENV)/bin/pcfast bench --json .benchmarks/latest.json

clean: ## remove the environment, builds and caches (not runs/)
	rm -rf $(VENV) .venv-lowest .venv-triton-* build dist *.egg-info pcfast/_native*.so pcfast/_cpu*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is touched last: a half-failed install leaves none and is repeated.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "error: pcfast needs Python 3.10 or newer as $(PYTHON): install it, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@rm -f $(VENV)/.installed-*
	@echo "creating $(VENV) with $(TORCH) (a minute or two, one more for the CPU kernels, and two for the CUDA kernels where there is nvcc)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) "$(TORCH)"
	@$(PIP_INSTALL) -e ".[train]"
	@touch $@

# pcfast itself stays as it is installed: its kernels are not compiled a second time.
$(TESTS): $(STAMP)
	@$(PIP_INSTALL) "pcfast[test]"
	@touch $@

# In front of the release in $(VENV), which stays as it is.
.venv-triton-%/.installed: $(STAMP)
	@rm -rf $(@D)
	@$(PIP_INSTALL) --no-deps --target $(@D) "triton==$*"
	@touch $@

# The tests' packages bring cmake, ninja and pybind11.
$(NATIVE): $(TESTS) $(NATIVE_SOURCES)
	@echo "compiling the kernels"
	@$(VENV_PYTHON) setup.py --quiet build_ext --inplace
	@touch $@
