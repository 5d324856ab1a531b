# `make quickstart` and `make test` do all their set-up themselves. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# Two environments must not rebuild each other's compiled operators, and ninja must be found beside the interpreter.
export PATH := $(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
# What pip resolves against: the tested versions.
CONSTRAINTS ?= constraints.txt
TEST_WORKERS ?= 2

.PHONY: help quickstart test test-slow test-gpu lint types check install install-dev clean

help:
	@echo "make quickstart     text -> shards -> three models at one FLOPs budget -> report (about 10 minutes on a laptop)"
	@echo "                    CORPUS=... your text (path, glob or hub:NAME); TOKENIZER=... yours (.model or tokenizer.json)"
	@echo "make test           the quick tests; PYTEST_ARGS='tests/mor_model -k causal' selects, TEST_WORKERS=8 uses more processes"
	@echo "make test-slow      the slow tests and random examples (hours)"
	@echo "make test-gpu       the tests that require a CUDA device"
	@echo "make lint types     ruff and mypy"
	@echo "make check          lint, types and the quick tests: run it before a commit"
	@echo "make install        create the environment $(VENV); make install-dev adds the test tools"
	@echo "make clean          remove the environment (runs/ stays)"

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "No virtual environment could be made; on Debian: apt-get install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c $(CONSTRAINTS) -e '.[fast]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c $(CONSTRAINTS) -e '.[fast,mpi,dev]'
	@touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

quickstart: $(VENV)/.installed
	@$(BIN)/mor compare run recipes/quickstart.yaml \
		$(if $(CORPUS),'data.corpus=$(CORPUS)') $(if $(TOKENIZER),'data.tokenizer=$(TOKENIZER)') $(OVERRIDES)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup -m '(slow or hypothesis) and not gpu' \
		--hypothesis-profile explore --timeout 3600 $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build *.egg-info
