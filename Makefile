# Commands of a working copy. `make venv` once, then `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: venv test quick lint check demo clean

venv: ## a virtual environment with everything that development needs
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 -e '.[dev]'

test: ## the whole test suite
	$(BIN)/python -m pytest

quick: ## the tests of seconds
	$(BIN)/python -m pytest -m "not slow"

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

demo:
	$(BIN)/blockffn demo

clean:
	rm -rf build dist runs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
