# vmherd's commands. `make` alone lists them. Each sets up by itself what it needs (tools/setup.sh).

# Which interpreter .venv is made with: make demo PYTHON=/usr/bin/python3.12
export PYTHON
# For tools/setup.sh's messages: the command that a person gave.
export VMHERD_MAKE_GOAL := $(firstword $(MAKECMDGOALS))

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: demo
demo: setup ## a herd of 3 hosts and 6 guests on this machine, and a tour (DEMO_ARGS=--exit ends after it)
	@$(BIN)/python -m tests.lab.demo $(DEMO_ARGS)

.PHONY: test
test: setup lint ## everything: check, unit, contract, scenarios, integration, lab (TEST_ARGS go to pytest)
	@$(BIN)/python -m tests --durations=3 $(TEST_ARGS)

.PHONY: check
check: setup-python lint ## formatting, ruff, mypy, import layers, unit tests
	$(PYTEST) -q tests/unit

.PHONY: fast
fast: setup-python ## what is quick and needs no root: unit, contract (on a Redis of their own), scenarios
	@$(BIN)/python -m tests --fast $(TEST_ARGS)

.PHONY: bench
bench: setup ## figures (BENCH_ARGS)
	@$(BIN)/python -m tests.benchmarks $(BENCH_ARGS)

.PHONY: setup
setup: ## what demo and test need: Debian packages, .venv, guest image
	@tools/setup.sh lab

.PHONY: lock
lock: setup-python ## write the lock files anew after a change of dependencies (UPGRADE=1 takes the newest)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK) --extra dev --output-file requirements.lock
	$(LOCK) --no-emit-package libvirt-python --constraint requirements.lock --output-file requirements-control.lock

# The lock files hold no registry's address: a machine with a mirror can use them.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links $(if $(UPGRADE),--upgrade) --custom-compile-command 'make lock' pyproject.toml

.PHONY: clean
clean: ## remove what the commands above made in this folder
	rm -rf .venv .lab .setup.log .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Steps of the commands above.
.PHONY: setup-python lint
setup-python:
	@tools/setup.sh python

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(BIN)/lint-imports
