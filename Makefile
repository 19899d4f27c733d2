# Two commands for a new user: `make quickstart` and `make test`. All that they make stays in this folder.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
CORES ?= 2
STUDY ?= config/config.yaml
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Caches that tools would keep in the home folder or in /tmp. Paths with spaces: quoted by the shell, never split.
export XDG_CACHE_HOME := $(CURDIR)/$(VENV)/cache
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/$(VENV)/cache/torchinductor
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A log gets a line a package of what pip says. A terminal gets all of it, with bars.
PACKAGES := sed -un -e 's/^Collecting \([^ ]*\).*/  \1/p' -e 's/^Installing collected packages.*/Unpacking them./p'

.PHONY: help install quickstart plan test lint clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

install: $(READY) ## make .venv with the pinned packages

$(READY): envs/lock.txt envs/lock-torch.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Detrojan needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	"$(PYTHON)" -m venv --clear $(VENV)
	@echo 'Installing what envs/lock.txt pins into $(VENV); the download decides how many minutes it takes.'
	@echo '1.9 GB with the CPU build of torch; several GB more with the CUDA build, which pip takes on Linux unless'
	@echo 'README.md, "Start", is followed.'
	@for lock in "--require-hashes --no-deps --requirement envs/lock.txt" "--requirement envs/lock-torch.txt"; do \
	  install="$(BIN)/python -m pip install $$lock"; \
	  if [ -t 1 ]; then $$install; else $$install | $(PACKAGES); fi; \
	done
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

quickstart: $(READY) ## run the default study: minutes on two cores
	$(BIN)/snakemake --profile local --cores $(CORES)
	$(BIN)/detrojan show

plan: $(READY) ## say what a study takes before it starts: make plan STUDY=config/survey.yaml
	$(BIN)/detrojan plan --configfile "$(STUDY)"

test: $(READY) $(VENV)/ready-timm ## run all tests that need neither GPU nor cluster
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/ready-lint ## run the linters, the type checker and the check of who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/detrojan schema | cmp - config/schema.json # else: detrojan schema > config/schema.json
	cp docs/tables.md $(VENV)/tables.md && $(BIN)/detrojan tables --page $(VENV)/tables.md
	cmp $(VENV)/tables.md docs/tables.md # else: detrojan tables --page docs/tables.md

$(VENV)/ready-lint: envs/lock-lint.txt $(READY)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement envs/lock-lint.txt
	touch $@

$(VENV)/ready-timm: envs/lock-timm.txt $(READY)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement envs/lock-timm.txt
	touch $@

clean: ## remove .venv and the caches, but no results
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
