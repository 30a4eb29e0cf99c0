# `make demo` and `make test` need Python ≥ 3.10 and nothing else: each makes .venv, installs everything and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test cuda-table lint clean

demo: $(STAMP)
	$(BIN)/svf-fast demo

test: $(STAMP)
	# two processes: most tests run on one thread; a file stays in one process with what it has set up
	$(BIN)/python -m pytest -n 2 --dist loadfile

cuda-table: $(STAMP)
	$(BIN)/python -m svf_fast.bench.nvcc

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(STAMP): pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "svf_fast needs Python 3.10 or newer, found " + sys.version.split()[0] + "; choose one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	# 2.13.0 is the version that the figures were measured with; any torch >= 2.11 works
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 'setuptools>=77' wheel ninja
	# the extension is compiled against that torch, hence without isolation; without a compiler this installs pure Python
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	# which backends that gave
	$(BIN)/python -m svf_fast.env | grep -E '^ +(torch|cpp|triton) |^extension'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info svf_fast/_C*.so
