# Names over the `suite` command. `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

SCALE ?= desk
STUDY ?= gora
BIN := .venv/bin
READY := .venv/.ready
SUITE := $(BIN)/suite
# Tests never ask a model hub, and each of the workers computes on one core.
TEST := HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup capabilities report ui docs doctor nightly test test-slow lint check clean

help:  ## List the targets
	@echo "Targets (SCALE=desk|bench|paper, default desk):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## Create .venv with the exact versions of constraints.txt

# The stamp is written last, so an interrupted setup is begun again; it is redone when either file changes.
$(READY): pyproject.toml constraints.txt
	@rm -rf .venv
	@set -e; python=; \
	for name in python3.11 python3 python; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "setup: Python 3.11 or newer is needed and none was found" >&2; exit 1; fi; \
	echo "setup: creating .venv with $$($$python --version)"; \
	$$python -m venv .venv
	@echo "setup: installing the packages of constraints.txt (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "setup: done"

reproduce-gora:  ## Run the GoRA study and write its report (again: continues, or only re-renders)
reproduce-%: $(READY)
	@$(SUITE) run $* --scale $(SCALE) --report

fair-gora:  ## Tune every row of the GoRA study alike, and put both protocols side by side
fair-%: $(READY)
	@$(SUITE) run $* --scale $(SCALE) --protocol fair --report

report: $(READY)  ## Write the report of what has been run (STUDY=gora)
	@$(SUITE) report $(STUDY) --scale $(SCALE)

nightly: $(READY)  ## Measure every study anew, hold it against baselines and papers, build the report
	@$(SUITE) nightly --scale $(SCALE)

ui: $(READY)  ## Open the MLflow pages on 127.0.0.1
	@$(SUITE) ui

docs: $(READY)  ## Write the methods' cards from their files
	@$(BIN)/python -m suite.cards

capabilities: $(READY)  ## Try what every method can do and write docs/capabilities.md
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m suite.capabilities

doctor: $(READY)  ## Say what this machine can run
	@$(SUITE) doctor

test: $(READY)  ## Run the fast tests
	@$(TEST) -m "not slow" -n 2

test-slow: $(READY)  ## Run the end-to-end tests on the real packaged models
	@$(TEST) -m slow

lint: $(READY)  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint test  ## lint, then test

clean:  ## Remove .venv and caches; results and reports stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
