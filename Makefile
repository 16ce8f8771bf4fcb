# `make demo` and `make test` work on a fresh machine and are safe to repeat: the virtual environment is
# made on first use, and again brought up to date when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERIFY_MODEL ?= examples.ci.shapes_dit:build
VERIFY_POLICY ?= fora:interval=3

.DELETE_ON_ERROR:
.PHONY: help install demo test test-full lint format types verify wheel clean

help:
	@echo "make demo       sample images with and without caching; table, pictures and graphs in demo/"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-full  all tests"
	@echo "make lint       ruff: rules and format (make format repairs)"
	@echo "make types      mypy on an installed copy of the package"
	@echo "make verify     prove the rewrite of the bundled denoiser; graphs and diffs in build/verify/"
	@echo "make wheel      dist/*.whl"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m dit_rewrite demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow"

test-full: $(INSTALLED)
	$(BIN)/python -m pytest -q

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
	cd build/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p dit_rewrite

verify: $(INSTALLED)
	$(BIN)/python -m dit_rewrite verify --model $(VERIFY_MODEL) --policy $(VERIFY_POLICY) --dump build/verify

wheel: $(INSTALLED)
	rm -rf build/types build/lib build/bdist.*
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf build dist demo *.egg-info .ruff_cache .pytest_cache .hypothesis
