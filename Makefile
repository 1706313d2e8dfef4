# make quickstart   train the main job on the embedded default, from nothing, in minutes
# make foundation   train the shipped encoder and T5 again, in half an hour or more, and score them as quickstart does
# make test         lint and the whole suite
# make lint         ruff and pyright alone
# PYTHON=...        a Python 3.11 or 3.12 to build .venv from; only its standard library is needed

SHELL := /bin/bash
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3 python3.11 python3.12; do \
	$$python -c '$(USABLE)' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
RUN_DIR ?= runs/quickstart
FOUNDATION_DIR ?= runs/foundation
WORKERS ?= 2
INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint requirements.lock
DECLARED := setup.py pyproject.toml requirements.lock

# What XLA compiled once is read back by every later run of the same program.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax-compilation

# XLA takes its buffers from the allocator anew in every step, which on a CPU costs less in huge pages. This is
# for glibc; elsewhere it means nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DELETE_ON_ERROR:
.PHONY: quickstart foundation test lint

quickstart: $(VENV)/installed-demo
	$(VENV)/bin/slm quickstart --run_dir $(RUN_DIR)

foundation: $(VENV)/installed-demo
	$(VENV)/bin/slm demo --to $(FOUNDATION_DIR)/corpus
	$(VENV)/bin/slm train --gin_file recipes/demo_t5.gin --gin.CORPUS_DIR="'$(FOUNDATION_DIR)/corpus'" \
		--gin.MODEL_DIR="'$(FOUNDATION_DIR)/t5_run'" --gin.LLM_OUTPUT="'$(FOUNDATION_DIR)/llm'"
	$(VENV)/bin/slm train --gin_file recipes/demo_encoder.gin --gin.CORPUS_DIR="'$(FOUNDATION_DIR)/corpus'" \
		--gin.MODEL_DIR="'$(FOUNDATION_DIR)/encoder_run'" \
		--gin.SPEECH_ENCODER_OUTPUT="'$(FOUNDATION_DIR)/speech_encoder'"
	$(VENV)/bin/slm quickstart --foundation $(FOUNDATION_DIR) --demo_dir $(FOUNDATION_DIR)/demo \
		--run_dir $(FOUNDATION_DIR)/quickstart

test: lint
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal --timeout 1800 --durations 15

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

$(VENV)/created:
	@$(or $(PYTHON),python3) -c '$(USABLE)' || { \
		echo "make: slm_jax needs a Python 3.11 or 3.12 with venv; name one: make PYTHON=python3.11 ..." >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/installed-demo: $(VENV)/created $(DECLARED)
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/installed-test: $(VENV)/created $(DECLARED)
	$(INSTALL) --editable '.[demo,test]'
	@touch $@ $(VENV)/installed-demo
