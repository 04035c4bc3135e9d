# Every target that runs something first sees to its own environment in .venv; nothing else on the machine is changed.
#   make demo ARGS="--budget 60%"    options after ARGS go to `tightfit train` (demo) or pytest (test)
#   make test PYTHON=python3.12      the interpreter that .venv is made from

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE_STAMP := $(VENV)/.installed-docs
# Quiet twice: errors only. Once would still print a warning per package for every index that lacks it.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

# A file's tests stay on one worker, since they share launches of several processes, models and traces. One thread per
# worker: two workers with torch's default of one thread per core only fight over the cores. The tests start many
# processes, so what they import is compiled once, whatever the environment says.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --durations=15

.PHONY: help demo test test-slow fresh wheel lint docs site bench versions clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make demo    fine-tune a small model inside a byte budget; the evidence goes to runs/"
	@echo "make test    lint, then the tests (ARGS=... goes to pytest)"
	@echo "make test-slow  the tests that take longer, run before a release (hours)"
	@echo "make fresh   the wheel in an environment of its own, with the newest solver: twenty plans, one document in a pipe"
	@echo "make wheel   build the wheel and the sdist into dist/"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make docs    write the generated pages of docs/ from the program and benchmarks/results"
	@echo "make site    build the documentation into site/ (open site/index.html)"
	@echo "make bench   run every script in benchmarks/"
	@echo "make versions  the whole test suite on the least, the pinned and the newest releases (hours)"
	@echo "make clean   remove .venv, caches and build output (runs/ stays)"

# The stamp is touched last, so an install that was interrupted is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "tightfit needs Python 3.11 or newer, found '$(PYTHON)': install it, or say make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module: on Debian or Ubuntu run 'apt install python3-venv', then make again" >&2; \
	    exit 1; }
	@echo "Setting up $(VENV) with the versions in constraints.txt (a few minutes and about 2 GB the first time) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/tightfit train $(ARGS)

test: lint
	@$(PYTEST) $(ARGS)

test-slow: $(STAMP)
	@TIGHTFIT_TESTS_TIME_OPS=1 $(PYTEST) -m "slow and not gpu" $(ARGS)

wheel: $(STAMP)
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log >&2; exit 1; }
	@ls dist/*

# What a user's first `pip install` takes and the constraints do not: the wheel, and the newest of everything small that
# it asks for, the solver above all. torch, transformers and the rest are those of .venv (a .pth file points there), since a
# second copy of them would take gigabytes; `make versions` tries other releases of those.
FRESH := .venv-fresh
fresh: wheel
	@rm -rf $(FRESH)
	@$(PYTHON) -m venv $(FRESH)
	@$(FRESH)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --upgrade \
	    highspy numpy rich typer safetensors
	@$(FRESH)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --no-deps dist/*.whl
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    "$$($(FRESH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_shared.pth"
	@$(BIN)/python tests/fresh.py $(FRESH)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(STAMP)
	@$(BIN)/python docs/generate.py

# The generator is an extra of its own: neither the demo nor the tests need it.
$(SITE_STAMP): $(STAMP)
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

site: $(SITE_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"

bench: $(STAMP)
	@set -e; for script in benchmarks/[a-z]*.py; do \
	    [ "$$script" = benchmarks/versions.py ] && continue; echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

versions: $(STAMP)
	@$(BIN)/python benchmarks/versions.py $(ARGS)

clean:
	rm -rf $(VENV) $(FRESH) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
