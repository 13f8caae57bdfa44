# Every target sets up .venv itself. `make test` is the whole gate; continuous integration runs the same line.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
# torch goes in first and exactly: a looser request may bring gigabytes of CUDA. For a CPU build from elsewhere:
#   make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

# Test processes; each uses one thread (tests/conftest.py).
WORKERS ?= 2

BIN := .venv/bin
PACKAGES := intervene records alignments defenses tasks
SOURCES := $(PACKAGES) tests $(wildcard benchmarks) $(wildcard *.py)
# The stamp carries a digest of what was asked for, and is written last: a killed set-up leaves none.
DIGEST := $(shell cat pyproject.toml constraints.txt | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-16)
READY := .venv/.ready-$(DIGEST)

.PHONY: das defense test fast lint format setup clean

das: $(READY)
	$(BIN)/python run_das.py --task ioi --variable position --model smollm2-135m --method full_vector,das \
	  --layers 11,14,17,20,23,26 --positions subject2,last --rank 8 --seeds 0,1,2 \
	  --n_train 128 --n_select 100 --n_test 300 --batch_size 32 --steps 40 --out runs/das --resume

DEFENSE := runs/defense
EXTRACT := $(BIN)/python train_defense.py extract --positive $(DEFENSE)/data/positive.jsonl \
  --negative $(DEFENSE)/data/negative.jsonl --layers 15 --overwrite

defense: $(READY)
	$(BIN)/python -m tasks.shouting $(DEFENSE)/data
	$(EXTRACT) --out $(DEFENSE)/data/shouting.safetensors
	$(EXTRACT) --out $(DEFENSE)/data/random.safetensors --placebo random
	$(BIN)/python train_defense.py compare --config examples/shouting.yaml --out $(DEFENSE)/compare --resume
	$(BIN)/python train_defense.py plot $(DEFENSE)/compare

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

fast: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy --strict $(PACKAGES)

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

setup: $(READY)

$(READY):
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.exit(0 if sys.version_info >= (3, 10) else f"set-up: needs Python 3.10 or newer, $(PYTHON) is {v}. Run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,dev,ray,deepspeed]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
