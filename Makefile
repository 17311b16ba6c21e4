# Everything runs in one virtual environment, made on first use. It needs python3 (3.11 or newer) and pip; a C++
# compiler builds the native kernels, and without one the plain PyTorch path runs.
#
#   make demo       install, bring Gemma 3 270M, fine-tune it and show what it learnt   (ARGS="--overwrite": again)
#   make test       ruff, mypy, import-linter and the fast tests
#   make test-all   the slow tests too
#   make bench      the same training steps here and in transformers, PEFT, bitsandbytes and TRL, in turns   (ARGS="--preset full")
#   make bench-kernels   each native operator against the memory bandwidth or product rate that bounds it
#   make bench-plan   what runs were predicted to need against what they needed   (ARGS="--rounds 1": once instead of three times)
#   make fuzz       damaged files of others (GGUF, safetensors, adapters, tokenizers) into the parsers   (ARGS="--seconds 1200 --seed 7")
#   make kill       every writer of final files, killed at each of its file operations
#   make sanitize   the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make format     let ruff rewrite what `make test` would refuse

PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
BENCH_OUT ?= runs/bench
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
# An editable install sees changed Python at once; these are what it must be repeated for.
INSTALLED := pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/* csrc/*/*)
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
# Two test processes share the machine's cores, so each computes on one; tests about threads ask for more themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help demo test test-all lint format clean bench bench-kernels bench-plan fuzz kill sanitize

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo-installed
	$(BIN)/halfbyte demo $(ARGS)

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

# Models: folders below ~/.cache/halfbyte-models (docs/benchmarks.md). One process at a time; leave the machine alone.
bench: $(VENV)/.dev-installed $(PEERS)/.installed
	$(BIN)/python benchmarks/compare.py --out $(BENCH_OUT) --peers-python $(PEERS)/bin/python \
	  --contenders halfbyte,loop,compile,trl,loop+halfbyte $(ARGS)

bench-kernels: $(VENV)/.dev-installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/operators.py $(ARGS)

bench-plan: $(VENV)/.dev-installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/plan_accuracy.py $(ARGS)

fuzz: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(ARGS)

kill: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill.py $(ARGS)

sanitize: $(VENV)/.dev-installed
	$(BIN)/python tests/sanitize.py $(ARGS)

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "halfbyte needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) makes no virtual environments (on Debian: apt-get install python3-venv)"; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

$(VENV)/.demo-installed: $(INSTALLED) | $(BIN)/python
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/.dev-installed: $(INSTALLED) | $(BIN)/python
	$(PIP) -e . --group dev
	@touch $@

# The peers, and halfbyte beside them without its requirements: bitsandbytes can run its kernels (docs/bitsandbytes.md).
$(PEERS)/.installed: benchmarks/peers-requirements.txt $(INSTALLED)
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers-requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps .
	@touch $@
