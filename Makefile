# `make demo` and `make test` work on a fresh machine and are safe to repeat: the virtual environment is
# made on first use, and again brought up to date when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERIFY_MODEL ?= dit_rewrite.demo.shapes.calls:build
VERIFY_POLICY ?= fora:interval=3
WORKERS ?= auto

.DELETE_ON_ERROR:
.PHONY: help install demo test test-full gpu lint format types verify docs wheel clean

help:
	@echo "make demo       sample images with and without caching; table, pictures and graphs in demo/"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-full  all tests"
	@echo "make gpu        on a machine with an NVIDIA GPU: the checks that need one, and the kernels' benchmark;"
	@echo "                make gpu PART=window runs one part of $(GPU_PARTS)"
	@echo "make lint       ruff: rules and format (make format repairs)"
	@echo "make types      mypy on an installed copy of the package, the benchmarks and the examples"
	@echo "make verify     prove the rewrite of the bundled denoiser; graphs and diffs in build/verify/"
	@echo "make docs       the pages, in build/docs; a broken link or anchor is an error"
	@echo "make wheel      dist/*.whl"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m dit_rewrite demo --out demo

# The same examples in every run, so that a change is judged by what it changed; test-full looks for new ones.
# Each worker runs one part of the files, and takes tests from another where it is done: fixtures of a module are built
# once, and no worker idles.
test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

test-full: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --hypothesis-profile=search

# For a machine that has torch, Triton, setuptools and perhaps pytest, and may reach no package index: into the Python
# that is there, without dependencies, and editable, as the tests and the benchmark run from this folder. Whole models need
# diffusers, and are skipped without. `make gpu PART=window` runs one part, each of which ends within nine minutes;
# `make gpu` runs all of them, and goes on behind one that fails. With pytest-xdist the tests compile on several cores.
GPU_PARTS := static tests tests_window tests_blockwise window change blockwise models graphs
PART ?= $(GPU_PARTS)
GPU_JOBS ?= 8
GPU_SECONDS ?= 530
GPU_TESTS_tests := tests/kernels/test_attention_entropy.py tests/kernels/test_relative_l1.py tests/cli/test_latency.py \
	tests/end_to_end/test_strategies_cuda.py tests/end_to_end/test_cuda_graphs_cuda.py
GPU_TESTS_tests_window := tests/kernels/test_window_attention.py tests/kernels/test_window_interface.py \
	tests/compiler/test_fuse_window_refresh.py
GPU_TESTS_tests_blockwise := $(addprefix tests/kernels/test_blockwise_,attention.py bounds.py graph_ops.py interface.py queries.py)
PIP_INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps
comma := ,
HAS = $(PYTHON) -c "import $(1)" 2>/dev/null
.PHONY: gpu_install $(addprefix gpu_,$(GPU_PARTS))

gpu: gpu_install
	@failed=""; for part in $(PART); do \
		echo "== $$part"; timeout $(GPU_SECONDS) $(MAKE) --no-print-directory gpu_$$part || failed="$$failed $$part"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

gpu_install:
	$(PIP_INSTALL) --no-build-isolation -e . || $(PIP_INSTALL) -e .

gpu_static:
	$(PYTHON) -m benchmarks.static_kernels --quick --jobs $(GPU_JOBS)

gpu_tests gpu_tests_window gpu_tests_blockwise:
	@if ! $(call HAS,pytest$(comma) hypothesis); then echo "left out without pytest and hypothesis"; else \
		workers=""; if $(call HAS,xdist); then workers="-n $(GPU_JOBS)"; fi; \
		CUBLAS_WORKSPACE_CONFIG=:4096:8 $(PYTHON) -m pytest -q -m cuda $$workers $(PYTEST_FLAGS) \
			$(GPU_TESTS_$(@:gpu_%=%)); \
	fi

gpu_window gpu_change gpu_blockwise gpu_models gpu_graphs:
	$(PYTHON) -m benchmarks.attention --device cuda --part $(@:gpu_%=%) --minutes 6

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers do not follow the mapping of the top-level folders, so an installed copy is checked. The cache goes
# with the copy: mypy trusts an old one that says that a new module does not exist.
types: $(INSTALLED)
	rm -rf build/types build/lib build/bdist.*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target build/types .
	cd build/types && MYPYPATH=$(CURDIR)/build/types:$(CURDIR) $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) \
		-p dit_rewrite -p benchmarks -p examples

verify: $(INSTALLED)
	$(BIN)/python -m dit_rewrite verify --model $(VERIFY_MODEL) --policy $(VERIFY_POLICY) --dump build/verify

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/docs

wheel: $(INSTALLED)
	rm -rf build/types build/lib build/bdist.*
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf build dist demo *.egg-info .ruff_cache .pytest_cache .hypothesis
