# All of it happens in .venv, made on first use. `make help` lists the verbs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
STAMP := $(VENV)/.surtitle-installed
SOURCES := pipeline ingest actors configs scripts tests
# A CPU-only torch where PyPI's would bring CUDA: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BENCH_MEDIA ?= media
BENCH_FILE ?= media/demo.wav
BENCH_STREAMS ?= 4

.PHONY: help setup demo test check format bench lock clean tools

help:  ## list the verbs
	@sed -nE 's/^([a-z]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "make %-8s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## make .venv with everything that is pinned

# Steps, because torch has no single hash and peft would bring in another torch (docs/dependencies.md); the last one
# installs this checkout itself.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "surtitle needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.11 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): two minutes when pip has the files already" >&2
	@$(PIP_INSTALL) --require-hashes -r requirements.lock
	@torch="$$(sed -nE 's/^ *"(torch==[^"]+)",$$/\1/p' pyproject.toml)"; \
	  $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$torch"
	@$(PIP_INSTALL) --no-deps $$(sed -nE 's/^ *"((accelerate|peft)==[^"]+)",$$/\1/p' pyproject.toml)
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# flite, espeak-ng and sox speak the demo and the media of the tests.
tools:
	@missing=""; for tool in flite espeak-ng sox; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing$$missing" >&2; \
	  { apt-get install -qq -y --no-install-recommends $$missing \
	    || { apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing; }; } >/dev/null; \
	else \
	  echo "missing:$$missing. On Debian and Ubuntu: sudo apt-get install$$missing" >&2; exit 1; \
	fi

demo: $(STAMP) tools  ## caption 40 s of speech in real time, and say how to see the same in Redis
	@$(BIN)/python scripts/make_media.py media
	@$(BIN)/surtitle caption media/demo.wav --realtime

test: check tools  ## check, then all tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP)  ## format the code and repair what lint can repair
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP) tools  ## measure accuracy (BENCH_MEDIA) and speed (BENCH_FILE, BENCH_STREAMS)
	@$(BIN)/python scripts/make_media.py media
	if [ -f $(BENCH_MEDIA)/manifest.json ]; then $(BIN)/surtitle bench accuracy --media $(BENCH_MEDIA); fi
	$(BIN)/surtitle bench live --streams $(BENCH_STREAMS) --media $(BENCH_FILE)

lock: $(STAMP)  ## resolve the dependencies again, with hashes; takes minutes
	test -x build/lock/bin/python || $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check pip-tools==7.6.2
	build/lock/bin/python scripts/lock.py

clean:  ## remove what was made: .venv, media, caches
	rm -rf $(VENV) build dist media .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
