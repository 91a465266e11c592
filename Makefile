# `make demo` and `make test` set everything up in .venv and run; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest/bin
OLDEST_PYTHON ?= python3.11
ADAPTED := tests/test_tools.py tests/hub tests/deploy/test_prepare.py tests/deploy/test_serve.py tests/deploy/test_torchao.py
DOCS_STAMP := .venv/.installed-docs

.PHONY: demo test test-slow oldest soak check lint types docs web node clean

demo: $(STAMP)
	$(BIN)/equiflop demo

# Without a GPU, Triton's interpreter runs the kernels in tests.
test test-slow: export TRITON_INTERPRET ?= $(if $(wildcard /dev/nvidia0),0,1)
test: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

# What takes more than about ten seconds a test: several processes, whole models in every runtime, compiled ones.
test-slow: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal -m slow

# The oldest versions that pyproject.toml allows. Some libraries need a newer hub client: their tests run behind the others.
oldest: export TRITON_INTERPRET ?= $(if $(wildcard /dev/nvidia0),0,1)
oldest:
	$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	$(OLDEST)/pip install --quiet --editable '.[test]' --constraint tests/oldest.txt
	$(OLDEST)/pytest -n 2 --dist worksteal -m "not slow"
	grep -v huggingface-hub tests/oldest.txt > .venv-oldest/constraints.txt
	$(OLDEST)/pip install --quiet --requirement tests/oldest-adapters.txt --constraint .venv-oldest/constraints.txt
	$(OLDEST)/pytest -n 2 --dist worksteal -m "not slow" $(ADAPTED)

soak: $(STAMP)
	$(BIN)/python tests/training/soak.py --kills 30

check: lint types test test-slow

lint: $(STAMP)
	$(BIN)/ruff check src tests examples benchmarks docs studies web
	$(BIN)/ruff format --check src tests examples benchmarks docs studies web

types: $(STAMP)
	$(BIN)/mypy

# The documentation as a site, in site/; a link that leads nowhere is an error. Nothing is fetched but its packages, once.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The page for browsers, on localhost: make web PORT=8081 takes another port than 8080.
web: node web/node_modules/.package-lock.json
	@PORT="$(PORT)" exec node web/serve.mjs

web/node_modules/.package-lock.json: web/package-lock.json | node
	npm ci --prefix web --ignore-scripts --no-audit --no-fund
	@touch $@

node:
	@command -v node npm >/dev/null || { echo "make web needs Node.js 20 or newer, with npm: https://nodejs.org" >&2; exit 1; }

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "equiflop needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $(DOCS_STAMP)

clean:
	rm -rf .venv .venv-oldest site web/node_modules build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
