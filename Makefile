# Every target creates and fills its own virtual environment; nothing else has to be installed
# than Python 3.11 or newer and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev
OLDEST := .venv-oldest
ARGS   ?=
WEIGHTS ?= random
BENCHES ?= estimators generation
SMALL   := $(if $(filter random-small,$(WEIGHTS)),device=cpu model.adapter.resolution=64)

TABLES := $(addprefix table,1 2 3 4 5 6 7 8 9 10 11 12 13 14)
FIGURES := $(addprefix figure,2 3 4 5 6 7 8 9 10 11 12) components stages faithfulness robustness
OPTIONS = $(if $(MODEL),model=$(MODEL)) \
	$(if $(filter-out 0 false,$(FAST)),making.fast=true) \
	$(if $(filter-out 0 false,$(DRY)),making.dry=true) \
	$(if $(FILTER),'making.filter="$(FILTER)"') \
	$(if $(METHODS),'making.methods="$(METHODS)"') \
	$(if $(SEEDS),making.seeds=[$(SEEDS)]) \
	$(if $(LAUNCHER),hydra/launcher=$(LAUNCHER)) \
	$(OVERRIDES) $(ARGS)
LISTED = $(if $(MODEL),model=$(MODEL)) $(if $(filter-out 0 false,$(FAST)),fast=true) $(ARGS)
RUN = $(BIN)/python run.py

export PYTHONDONTWRITEBYTECODE ?= 1

.DEFAULT_GOAL := help
.PHONY: help run tables figures ratios status report zoo docs $(TABLES) $(FIGURES) bench bench-full test check check-ray check-oldest lint types format miniature clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) ## erase "parachute" from the miniature and show the proof; ARGS="concept=church edit=contrast"
	$(RUN) $(ARGS)

tables: $(READY) ## the paper's tables, or one: make table7 MODEL=mini; also FAST=1 DRY=1 SEEDS=0,1,2 LAUNCHER=slurm METHODS=+mine FILTER="concept=church edit=uce"
	$(RUN) table=all $(OPTIONS)

$(TABLES): $(READY)
	$(RUN) table=$(shell printf 'table%02d' $(@:table%=%)) $(OPTIONS)

figures: $(READY) ## its figures, or one: make figure2 to figure12, components (where a concept sits), stages (and when), faithfulness (what scores are worth), robustness (what brings a concept back)
	$(RUN) figure=all $(OPTIONS)

$(FIGURES): $(READY)
	$(RUN) figure=$@ $(OPTIONS)

ratios: $(READY) ## the ratio of every concept and edit, chosen from pictures; MODEL=mini DRY=1 ARGS="edits=[erase] concepts=[church] n=50 write=true"
	$(BIN)/python -m experiments.tables.choose_ratios $(if $(MODEL),model=$(MODEL)) $(if $(filter-out 0 false,$(DRY)),dry=true) $(ARGS)

status: $(READY) ## of all tables and figures: runs done and missing; MODEL=mini
	$(BIN)/python -m experiments.tables.status $(LISTED)

report: $(READY) ## every table and figure that was made, in one HTML page; MODEL=mini
	$(BIN)/python -m experiments.tables.report $(if $(MODEL),model=$(MODEL)) $(ARGS)

zoo: $(READY) ## the edits of the tables' finished runs, small files with an index, in results/MODEL/zoo; MODEL=mini
	$(BIN)/python -m experiments.tables.zoo $(LISTED)

docs: $(DEV) ## the documentation as a site with the API's reference, in results/site/index.html
	$(BIN)/pip install -q --disable-pip-version-check -e ".[docs]"
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/mkdocs build --strict --quiet

bench: $(READY) ## speed on the miniature against what it replaces (hours on two cores), into results/bench; BENCHES=generation for one
	for bench in $(BENCHES); do $(BIN)/python -m experiments.benchmarks.$$bench $(ARGS) || exit; done

bench-full: $(READY) ## time and memory of every edit, and images per second, at full size on random weights; WEIGHTS=random-small tries it anywhere
	$(RUN) table=costs model.weights=$(WEIGHTS) $(SMALL) $(if $(SMALL),debug=tiny ratio.value=0.05) $(ARGS)
	$(BIN)/python -m experiments.benchmarks.generation model=sd14 model.weights=$(WEIGHTS) $(SMALL) $(if $(SMALL),model.sampler.steps=3)

test: $(DEV) ## all tests; ARGS="-k weight_edit" for some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

check: lint types test ## what CI runs: ruff, mypy, pytest

check-ray: $(DEV) ## installs the extra [ray] too, and runs the tests of it; CI runs this after check
	$(BIN)/pip install -q --disable-pip-version-check -e ".[ray]"
	$(BIN)/python -m pytest -m ray $(ARGS)

check-oldest: ## tests of cad/ and baselines/ with the oldest torch and diffusers that pyproject.toml takes, in an environment of their own (6 GB)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q --disable-pip-version-check \
		$(shell sed -nE 's/^ +"(torch|torchvision|diffusers)>=([0-9.]+)".*/\1==\2/p' pyproject.toml)
	$(MAKE) test VENV=$(OLDEST) ARGS="tests/cad tests/baselines"

lint: $(DEV) ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy on the packages
	$(BIN)/mypy

format: $(DEV) ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

miniature: $(DEV) ## train the shipped model anew (hours on two cores); ARGS="teacher=FOLDER data.parquet=PATH"
	$(BIN)/pip install -q -e ".[miniature]"
	$(BIN)/python -m experiments.miniature.train $(ARGS)

clean: ## remove the virtual environment and caches; results/ stays
	rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

$(DEV): pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@ $(READY)
