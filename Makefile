# Two commands on a fresh machine: `make demo` and `make test`. They need Python 3.11, make and a package index.
PYTHON ?= python3
CORES ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)))")
SEED ?= $(shell $(PYTHON) -c "import secrets; print(secrets.randbelow(1 << 32))")
BIN := .venv/bin
SET_UP := .venv/set-up
LLMEXPORT := .venv-llmexport/set-up

.PHONY: help setup demo test fuzz test-families test-slow test-browser test-published test-cluster test-faults test-kills lint format schema bench bench-quant bench-quant-2b newest train-shapes-vl clean

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(SET_UP): requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'hf2mnn needs Python 3.11 or newer; name one with make PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(LLMEXPORT): bench/llmexport.txt
	$(PYTHON) -m venv .venv-llmexport
	.venv-llmexport/bin/pip install --quiet --disable-pip-version-check --requirement bench/llmexport.txt
	touch $@

setup: $(SET_UP) ## create .venv with pinned dependencies

demo: $(SET_UP) ## convert and evaluate the embedded model
	$(BIN)/snakemake --cores $(CORES)

test: $(SET_UP) ## all tests, with the pipeline on the embedded model
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

fuzz: $(SET_UP) ## property tests with random values, and 100,000 hostile files for all parsers; SEED=n repeats an earlier run
	$(BIN)/pytest -m "hypothesis and not slow" --hypothesis-profile=long --hypothesis-seed=$(SEED)

test-families: $(SET_UP) ## every family from a checkpoint to answers (about 3 minutes on 2 cores)
	$(BIN)/pytest tests/families -m "slow or not slow" --numprocesses auto --dist loadgroup

test-slow: $(SET_UP) ## long tests that others cover in parts: a killed run, the bench on a small model, ...
	$(BIN)/pytest -m slow --ignore tests/families

test-browser: $(SET_UP) ## the report in Chromium, on PATH or in CHROMIUM
	$(BIN)/pytest tests/browser

test-published: $(SET_UP) ## real tokenizers of the npm registry, 20,000 texts each (100 MB, about 5 minutes on 2 cores)
	$(BIN)/pytest tests/published

test-cluster: $(SET_UP) ## the pipeline on a one-node SLURM and as pods with a bucket; root on Linux, slurm-wlm and munge (15 minutes)
	$(BIN)/pytest tests/cluster

test-faults: $(SET_UP) ## full disks, little memory, no network, killed stages; root on Linux (about 15 minutes)
	$(BIN)/pytest tests/failures

KILLS ?= 200
test-kills: $(SET_UP) ## kill stages at random moments and repeat them (KILLS=200: about half an hour)
	PYTHONPATH=tests $(BIN)/python tests/kills.py --kills $(KILLS)

lint: $(SET_UP) ## formatting and lint of Python and Snakemake files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint

format: $(SET_UP) ## format Python and Snakemake files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

schema: $(SET_UP) ## write the schema of config.yaml
	$(BIN)/hf2mnn schema > workflow/schemas/config.schema.yaml

bench: $(SET_UP) $(LLMEXPORT) ## the 2B shape beside llmexport (20 GB of disk, 19 GB of memory, 20 to 30 minutes)
	$(BIN)/python bench/scale.py $(BENCH)

bench-quant: $(SET_UP) ## quantization methods beside the converter's (about 10 minutes on 2 cores)
	$(BIN)/python bench/quant.py

bench-quant-2b: $(SET_UP) ## the same on a decoder of 1.5 B parameters (35 GB of disk, 20 to 30 minutes)
	$(BIN)/python bench/quant.py qwen2-vl-2b

newest: $(SET_UP) ## the embedded model with the newest releases of the tools (about 10 minutes)
	mkdir -p .newest
	$(BIN)/snakemake --cores $(CORES) --directory .newest --configfile workflow/newest.yaml --keep-going --forcerun make_toolchain

train-shapes-vl: $(SET_UP) ## train the embedded model (about an hour on 2 cores)
	$(BIN)/python models/shapes-vl/training/train.py --out models/shapes-vl

clean: ## remove results, but not .venv
	rm -rf results/*/ results/*.csv results/*.txt logs benchmarks .snakemake .toolchains .newest
