# Every target sets up what it needs: in a bare checkout with Python 3.11 or newer, `make demo` works.

# The first of these that runs, is new enough and can make a virtual environment.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	{ echo $$python; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := $(BIN)/pytest -n auto # ARGS="-n 0" runs all tests in one process, as plain pytest does

.DEFAULT_GOAL := help
.PHONY: help install demo run test chaos drill quality bloat manifests check fix lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with everything in it, hashes checked

$(INSTALLED): pyproject.toml deploy/dev.lock
	@$(BIN)/python -c '' 2>/dev/null || { \
		test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer with venv (Debian: python3-venv)" >&2; exit 1; }; \
		echo "making .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r deploy/dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install ## Hand off this repository: import its history, generate, print
	$(BIN)/baton demo

run: install ## API and worker on http://127.0.0.1:8000, PostgreSQL included
	$(BIN)/baton run

test: install ## Tests; ARGS="-k embedded -x" goes to pytest
	$(PYTEST) $(ARGS)

chaos: install ## Break it in every way (15 minutes); ARGS="--only 6,16" picks
	$(BIN)/python -m tests.chaos $(ARGS)

drill: install ## Six faults, and what an on-call does with psql (3 minutes); writes docs/drill.md
	$(BIN)/python -m tests.chaos.drill $(ARGS)

quality: install ## Score the artifacts against changelogs that people wrote; ARGS=folder
	$(BIN)/python -m bench.quality $(ARGS)

bloat: install ## A million jobs through the queue, and what is left of them; ARGS="--jobs 50000"
	$(BIN)/python -m bench.bloat $(ARGS)

manifests: install ## Check what is under deploy/ against the schemas of Kubernetes
	$(BIN)/python -m tests.manifests

check: install ## What CI checks: format, lint, types, tests
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy app tasks tests bench
	$(PYTEST) $(ARGS)

fix: install ## Format, and repair what lint can repair
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

lock: ## Pin the dependencies of pyproject.toml anew, keeping pins that fit
	PYTHON=$(PYTHON) deploy/lock
