# `make run`, `make test`, `make check` and `make deploy-demo` each set up everything they need, once, in .venv.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/installed
# One worker more than cores: the slow tests mostly wait for servers.
WORKERS ?= $(shell expr $$(nproc 2>/dev/null || echo 2) + 1)

.PHONY: run test test-long check deploy-demo install clean

run: $(INSTALLED)
	@$(BIN)/isocenter run $(ARGS)

test: $(INSTALLED)
	@$(BIN)/pytest --numprocesses $(WORKERS) --dist load --maxschedchunk 1 $(ARGS)

# Whole runs at separate sites with whatever can happen to them, and the README's long blocks.
test-long: $(INSTALLED)
	@$(BIN)/pytest -m long --numprocesses $(WORKERS) --dist load --maxschedchunk 1 $(ARGS)

deploy-demo: $(INSTALLED)
	@$(BIN)/python -m simulations.deploy_demo $(ARGS)

check: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "make: python3 must be installed, version 3.11 or newer; install it, or name one: make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: python3 must be version 3.11 or newer, got %d.%d; name another one: make PYTHON=/path/to/python3." % sys.version_info[:2])'
	@echo "make: installing isocenter and what it needs into .venv, once; this takes a few minutes ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	@$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null || true # on all cores; pip takes one. Some files are templates.
	@touch $@
	@echo "make: installed."

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
