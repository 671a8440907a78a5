# Everything lives in .venv; `make demo` and `make test` set it up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Test processes: half of what a test does is waiting, for launchers, ranks and disks. A file's tests stay in one.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.PHONY: help setup demo test test-all check format clean

help:
	@echo "make demo      two ranks train a small WF-VAE, stop, resume and reconstruct a clip (runs/demo)"
	@echo "make test      the tests that take minutes in all"
	@echo "make test-all  those and the slow ones"
	@echo "make check     formatting, lint, types and rankwise check"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankwise needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trackers]'
	$(PYTEST)

check: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

format: $(STAMP)
	$(BIN)/ruff check --fix-only --quiet src tests examples benchmarks
	$(BIN)/ruff format --quiet src tests examples benchmarks

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
