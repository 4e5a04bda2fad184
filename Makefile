# FoloVLLM: `make demo` shows it at work, `make test` checks it. Each target installs what it needs into $(VENV), once;
# a stamp file there tells when that is out of date. Package index and proxies are whatever pip is configured to use.

PYTHON ?= python3
VENV ?= .venv
VENV_LOWER ?= .venv-lower
DOCS ?= site
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check -c
STEP = @echo "==>"
# The variable: no notice about the theme's plans in every build. Never with --quiet: warnings are then not made, and
# --strict has none to refuse.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs clean test-lower
.SUFFIXES:

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /make \1\t/' | expand -t 18
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_ARGS=$(PYTEST_ARGS)"

demo: $(VENV)/.demo-stamp  ## Install the package, get a small chat model and print its answers
	$(STEP) "demo: two prompts, the default model (its first use downloads about 90 MB)"
	$(BIN)/folovllm generate "What is the capital of France?" "Why is the sky blue?" --max-tokens 80 --temperature 0 \
		--dtype float32  # so that every machine prints the same: in bfloat16 a close call may go either way

test: lint  ## Lint, then all tests with coverage, then the bad-input tests under python -O
	$(STEP) "pytest, with coverage"
	$(BIN)/python -m pytest -q --durations=10 --cov=folovllm --cov-report=term --cov-fail-under=85 $(PYTEST_ARGS)
	$(STEP) "pytest under python -O: bad input is refused without assert"
	$(BIN)/python -O -m pytest -q -m badinput -W ignore::pytest.PytestConfigWarning
	$(STEP) "all passed"

lint: $(VENV)/.dev-stamp  ## Ruff, mypy, import-linter, size check, documentation site
	$(STEP) "ruff check"
	$(BIN)/ruff check .
	$(STEP) "ruff format --check"
	$(BIN)/ruff format --check .
	$(STEP) "mypy (strict)"
	$(BIN)/mypy
	$(STEP) "import-linter: the dependency rule"
	$(BIN)/lint-imports --no-logo
	$(STEP) "size check"
	$(BIN)/python tools/check_size.py
	$(STEP) "mkdocs: the documentation builds, and no link is broken"
	$(MKDOCS) build --strict --site-dir $(abspath $(VENV))/site

docs: $(VENV)/.dev-stamp  ## Documentation and API reference as HTML in site
	$(STEP) "mkdocs"
	$(MKDOCS) build --strict --site-dir $(abspath $(DOCS))
	@echo "open $(DOCS)/index.html"

test-lower: $(VENV_LOWER)/.stamp  ## The tests again with the lowest dependency versions allowed
	$(STEP) "pytest with the lower bounds of constraints-lower.txt"
	$(VENV_LOWER)/bin/python -m pytest -q --ignore=tests/unit/test_m0_project.py --ignore=tests/unit/test_m0_readme.py $(PYTEST_ARGS)

clean:  ## Remove .venv, caches, generated docs and build output (an environment elsewhere is left alone)
	rm -rf .venv .venv-lower site docs/api build dist folovllm.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* htmlcov
	find folovllm tests tools examples reference -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Environments. The development install contains the demo's, so it renews that stamp too. Stamps depend only on what
# is installed: the package itself is an editable install, so that an edit of its code needs none.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "FoloVLLM needs Python 3.10 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(STEP) "virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(STEP) "install folovllm (torch makes the first time take a while)"
	$(BIN)/python $(PIP_INSTALL) constraints.txt -e .
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(STEP) "install folovllm with its test tools (torch makes the first time take a while)"
	$(BIN)/python $(PIP_INSTALL) constraints.txt -e '.[dev]'
	@touch $(VENV)/.demo-stamp $@

$(VENV_LOWER)/.stamp: pyproject.toml constraints-lower.txt
	$(STEP) "virtual environment with the lower bounds in $(VENV_LOWER)"
	$(PYTHON) -m venv $(VENV_LOWER)
	$(VENV_LOWER)/bin/python $(PIP_INSTALL) constraints-lower.txt -e . accelerate pytest pytest-cov hypothesis scipy
	@touch $@
