# make demo | test | test-slow | lint | format | install | clean
#
# Each target works alone on a machine with git, make and Python 3.10, 3.11 or 3.12 (3.13 without Lava).
# make PYTHON=python3.11 …   chooses the interpreter (a name, a path or a version)
# make VENV=.venv-3.11 …     chooses the environment's folder
# make PYTEST_ARGS='-k gate' test
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, …) are respected.

SHELL := /bin/sh
PYTHON ?=
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN = $(VENV)/bin
# Whole files go to one worker, so that what a file builds once is used by all of its tests; and each worker has one thread.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all pytest lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 8

install:
	@scripts/install.sh '$(VENV)' '$(PYTHON)'

demo: install
	@$(BIN)/atsnn-export demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint pytest

# The tests alone, without the slow ones.
pytest: install
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-slow: install
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: lint
	$(PYTEST) $(PYTEST_ARGS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv.lock .venv-3.* build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
