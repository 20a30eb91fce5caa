PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SETUP := PYTHON=$(PYTHON) sh tests/lab/setup.sh

.DEFAULT_GOAL := help
.PHONY: help demo test test-all campaign run lint

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

demo: ## see it work, in a guest kernel with a real ublk driver
	@$(SETUP) lab
	@$(BIN)/python -m tests.lab demo

test: ## every test, on the host and in guest kernels; ARGS go to pytest
	@$(SETUP) lab
	@$(BIN)/python -m pytest $(ARGS)

test-all: ## that, on a third kernel too, and the whole fault campaign on all three: for a night
	@DUENDE_LAB_MATRIX=all $(SETUP) lab
	@$(BIN)/python -m pytest
	@DUENDE_LAB_MATRIX=all $(BIN)/python -m pytest tests/test_guest.py -k 6.18
	@DUENDE_LAB_MATRIX=all $(BIN)/python -m tests.lab campaign

campaign: ## thousands of injected faults in guest kernels; ARGS: --kernel 6.12 --seed 7 --faults 100 --only KIND
	@DUENDE_LAB_MATRIX=all $(SETUP) lab
	@DUENDE_LAB_MATRIX=all $(BIN)/python -m tests.lab campaign $(ARGS)

run: ## the daemon in the foreground, on this machine
	@$(SETUP) python
	@[ "$$(id -u)" = 0 ] || { echo "the daemon talks to the kernel as root: sudo make run"; exit 2; }
	@$(BIN)/duende-ublkd run --config config/duende-ublkd.toml

lint: ## the linters alone
	@$(SETUP) python
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
