# raysp: `make help` lists what can be made. Needs Python 3.11 or newer, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .raysp/demo
PIP := $(BIN)/pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full check bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.train ## Make .venv and install raysp with everything that training needs
	@echo "ready: $(BIN)/raysp --help"

demo: $(VENV)/.train ## Train a small model on real text with heterogeneous groups (about 5 minutes on 2 cores)
	@$(BIN)/raysp prepare "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
		--include '*.py' --exclude site-packages --train-tokenizer 8192 --output $(DEMO)/data
	@rm -rf $(DEMO)/checkpoints
	@$(BIN)/raysp train --config jobs/configs/demo.toml

test: $(VENV)/.dev ## Run the tests (under 20 minutes on 2 cores)
	@$(BIN)/python -m pytest -q -m "not slow" tests

test-full: $(VENV)/.dev ## Run all tests, the slow ones too
	@$(BIN)/python -m pytest -q tests

check: $(VENV)/.dev ## Lint, check formatting, types and import arrows
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict --package planner
	@$(BIN)/mypy --package raysp --package jobs
	@$(BIN)/lint-imports

bench: $(VENV)/.dev ## Compare policies on real batches; writes benchmarks/results
	@$(BIN)/python benchmarks/end_to_end.py

clean: ## Remove the environment and what the demo wrote
	rm -rf $(VENV) $(DEMO) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raysp needs Python 3.11 or newer; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@$(PIP) --editable '.[train,dev]'
	@touch $@
