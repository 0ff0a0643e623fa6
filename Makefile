# `make demo` and `make test` do all the set-up they need, in a virtual environment .venv in this folder.
PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
NAME ?=
SHIFTS ?= 1-20
TESTS ?=
ARGS ?=
PYRO ?=

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt
# Small tensors: two processes of one thread each beat one process of two threads.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: demo test reseed pyro-tests setup lint format types doctest readme notebooks wheel-check matrix benchmark clients clean distclean help

demo: .venv/.installed ## Install what is needed, run the demo, write its figures and report to demo/
	$(BIN)/pyroebm demo --out demo

test: .venv/.installed-dev ## Install what is needed, run the tests, the docstrings' and README's examples and the notebooks
	$(PYTEST) -n $(JOBS) --dist worksteal --durations 10 $(PYTEST_ARGS)

reseed: .venv/.installed-dev ## Run the statistical tests with other seeds, SHIFTS=1-20, and count failures; or TESTS=file::test
	$(TEST_ENV) $(BIN)/python scripts/reseed_tests.py --jobs $(JOBS) --shifts "$(SHIFTS)" $(TESTS)

pyro-tests: .venv/.installed-dev ## Run Pyro's own tests of MCMC with pyroebm.infer: PYRO=checkout; ARGS="test_hmc.py -k gamma"
	@test -n "$(PYRO)" || { echo "name a checkout of Pyro: make pyro-tests PYRO=path"; exit 1; }
	$(TEST_ENV) $(BIN)/python scripts/pyro_tests.py "$(PYRO)" $(ARGS)

setup: .venv/.installed-dev ## Install the package and everything a developer needs, nothing else

lint: .venv/.installed-dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed-dev ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.installed-dev ## Check types
	$(BIN)/mypy

doctest: .venv/.installed-dev ## Run the docstrings' examples alone
	$(PYTEST) pyroebm $(PYTEST_ARGS)

readme: .venv/.installed-dev ## Run the README's and the docs' code blocks alone
	$(PYTEST) tests/test_readme.py $(PYTEST_ARGS)

notebooks: .venv/.installed-dev ## Run every notebooks/NN_name.py, or NAME=NN_name, and write its .ipynb with fresh outputs
	$(BIN)/python scripts/notebooks.py $(NAME)

wheel-check: .venv/.installed-dev ## Build the wheel, install it in a clean environment, run the README's first example there
	$(BIN)/python scripts/wheel_check.py

matrix: .venv/.installed-dev ## Run the suite on the wheel with pinned, newest and lowest versions (gigabytes, hours), or ARGS="--only NAME"
	$(BIN)/python scripts/matrix.py --pytest-args='-n $(JOBS) --dist worksteal $(PYTEST_ARGS)' $(ARGS)

benchmark: .venv/.installed-dev ## Run the benchmarks: all, or NAME=name; ARGS=--quick for a short run
	@set -e; for script in $(if $(NAME),benchmarks/$(NAME).py,$(filter-out %/tables.py,$(wildcard benchmarks/[a-z]*.py))); do \
	  test -e "$$script" || { echo "no $$script"; exit 1; }; \
	  module="benchmarks.$$(basename "$$script" .py)"; \
	  echo "$(BIN)/python -m $$module $(ARGS)"; $(BIN)/python -m "$$module" $(ARGS); \
	done

clients: .venv-clients/.installed .venv-botorch/.installed ## Run BoTorch, GPyTorch, sbi and Pyro's modules with our classes, in environments of their own (gigabytes)
	$(TEST_ENV) .venv-clients/bin/python scripts/clients.py $(ARGS)
	$(TEST_ENV) .venv-botorch/bin/python scripts/botorch_saas.py

clean: ## Remove what was built: caches, wheels, the demo's and the recipes' output
	rm -rf build dist demo runs .mypy_cache .ruff_cache .pytest_cache
	find . -name .venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## ... and the virtual environment
	rm -rf .venv .venv-clients .venv-botorch

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

# The stamps: what is installed, renewed when a requirement or a pin changes.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pyroebm needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name another one, for example: make demo PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.created pyproject.toml constraints.txt
	@echo "Installing pyroebm and what it needs in .venv (about a minute) ..."
	$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-dev: .venv/.created pyproject.toml constraints.txt
	@echo "Installing pyroebm and what a developer needs in .venv (about a minute) ..."
	$(PIP_INSTALL) -e '.[dev,flows]'
	@touch .venv/.installed $@

.venv-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -qq --no-input --disable-pip-version-check -c constraints-$*.txt -e '.[$*]'
	@touch $@
