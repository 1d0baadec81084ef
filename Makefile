# Every target that needs the environment makes it first; a second run finds it ready.
# Variables of `make install`: PYTHON, TORCH_INDEX_URL, PIP_FLAGS (scripts/install.sh explains them).
# ARGS goes to the command behind a target: make test-unit ARGS="-k kl", make quickstart ARGS=run.seed=1

SHELL := bash
.DEFAULT_GOAL := help

override VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
PIP_FLAGS ?= -qq
export PYTHON TORCH_INDEX_URL PIP_FLAGS VENV
PYTEST := $(BIN)/python -m pytest
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile
ARGS ?=

##@ Use

.PHONY: install
install: $(READY) ## Make .venv with everything pinned (two minutes once, then instant)
	@echo "$(VENV) is ready; next: make quickstart"

$(READY): requirements/cpu.txt requirements/torch.txt pyproject.toml
	@scripts/install.sh

.PHONY: quickstart
quickstart: $(READY) ## Install, then run the main job on a built-in task
	$(BIN)/rlhf-dist train configs/quickstart.yaml --overwrite $(ARGS)

##@ Develop

.PHONY: test
test: $(READY) ## Install, then run the tests; ARGS=--long: the long ones, too
	$(PYTEST) tests/unit --numprocesses 2 $(ARGS)
	$(PYTEST) tests/integration $(SIDE_BY_SIDE) $(ARGS)
	$(PYTEST) tests/chaos $(ARGS)

.PHONY: test-unit
test-unit: $(READY) ## Only the fast tests: no Ray, no engine
	$(PYTEST) tests/unit --numprocesses 2 $(ARGS)

.PHONY: test-integration
test-integration: $(READY) ## Only the tests with real workers
	$(PYTEST) tests/integration $(SIDE_BY_SIDE) $(ARGS)

.PHONY: test-gpu
test-gpu: ## What only a GPU shows, in the environment that is active (requirements/gpu.txt)
	python -m pytest tests/gpu $(ARGS)

.PHONY: chaos
chaos: $(READY) ## Kill everything at seeded moments, for hours if asked: ARGS="--chaos-runs 20 --chaos-seed 7"
	$(PYTEST) tests/chaos --chaos-runs 1 --chaos-out runs/chaos.json $(ARGS)

.PHONY: check
check: $(READY) ## Formatting, lint, types, import layers; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

.PHONY: format
format: $(READY) ## Format, and mend what the linter can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: lock
lock: $(READY) ## Pin the newest versions that pyproject.toml allows (some minutes)
	$(BIN)/python scripts/lock.py

.PHONY: clean
clean: ## Delete caches and build outputs; keeps .venv and runs/
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## The same, and delete .venv
	rm -rf $(VENV)

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
