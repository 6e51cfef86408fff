# Every target creates and fills its own virtual environment; nothing else has to be installed
# than Python 3.11 or newer and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev
ARGS   ?=

export PYTHONDONTWRITEBYTECODE ?= 1

.DEFAULT_GOAL := help
.PHONY: help run test check lint types format miniature clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) ## erase "parachute" from the miniature and show the proof; ARGS="concept=church edit=amplify"
	$(BIN)/python run.py $(ARGS)

test: $(DEV) ## all tests; ARGS="-k weight_edit" for some
	$(BIN)/python -m pytest $(ARGS)

check: lint types test ## what CI runs: ruff, mypy, pytest

lint: $(DEV) ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy on the packages
	$(BIN)/mypy

format: $(DEV) ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

miniature: $(DEV) ## train the shipped model anew (hours on two cores); ARGS="data.parquet=PATH"
	$(BIN)/pip install -q -e ".[miniature]"
	$(BIN)/python -m experiments.miniature.train $(ARGS)

clean: ## remove the virtual environment and caches; results/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

$(DEV): pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@ $(READY)
