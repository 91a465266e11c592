# `make demo` and `make test` set everything up in .venv and run; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test soak check lint types clean

demo: $(STAMP)
	$(BIN)/equiflop demo

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal

soak: $(STAMP)
	$(BIN)/python tests/soak.py --kills 30

check: lint types test

lint: $(STAMP)
	$(BIN)/ruff check src tests examples benchmarks docs studies
	$(BIN)/ruff format --check src tests examples benchmarks docs studies

types: $(STAMP)
	$(BIN)/mypy

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "equiflop needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
