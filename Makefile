# make demo    install and run the main job on the embedded model and data (no network after the install)
# make test    the whole test suite
# make check   formatting, lint, types
# make docs    the documentation site, into site/ (strict: a broken link is an error)
# make bench   every benchmark, and the tables in benchmarks/results
# make evidence SLUG=ggem    run a reproduction in full and write its page
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test check format bench docs evidence clean

demo: $(VENV)/.core
	$(BIN)/cenote probe

# The second run holds what run-time shape checks would get in the way of: torch.compile, torch.export, ONNX.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS)
	CENOTE_TYPECHECK=0 $(BIN)/python -m pytest -q -n $(WORKERS) -m compiled

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run_all.py

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

evidence: $(VENV)/.test
	$(BIN)/python tools/write_evidence.py $(or $(SLUG),--all)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache

# Stamps: nothing is installed again while pyproject.toml stays the same. What the tests need includes the core.
$(VENV)/.core: pyproject.toml | $(BIN)/python
	@echo 'installing cenote into $(VENV): a minute or a few, once'
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo 'installing cenote and what its tests need into $(VENV): a few minutes, once'
	$(BIN)/python -m pip install -q -e '.[test,check]'
	@touch $(VENV)/.core $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cenote needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
