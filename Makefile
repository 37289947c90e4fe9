# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each target makes .venv and installs what it needs when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test lint check docs constraints clean

help:  ## Show what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,geo,vector,tensorboard,export,openvino,hub,serve,stream,cluster]'
	touch $@

demo: $(READY)  ## Learn the synthetic urban, adapt to the country without its labels, print a table and a verdict
	$(BIN)/overfly benchmark recipes/demo --seeds 1 --split test --out $(DEMO)
	@echo; echo "Which network to use, judged without the country's labels:"
	$(BIN)/overfly adapt recipes/demo/3-adapted.yaml --no-estimate --out $(DEMO)
	@echo; echo "pictures:"; ls -d $(CURDIR)/$(DEMO)/*/samples

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(READY)  ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint test  ## All that must pass before a change lands

docs: $(READY)  ## Write the pages that are made from the code
	$(BIN)/python docs/build.py
	$(BIN)/python docs/methods.py

constraints: $(READY)  ## Pin what is installed now
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
