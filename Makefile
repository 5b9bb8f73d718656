PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Libraries are compiled at installation; the project's bytecode, compiled at its first import, is kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# Where `make gpu` writes and `make performance` reads; the Python of the machine that a bundle is for.
GPU_RESULTS := benchmarks/gpu/results
GPU_BUNDLE := .gpu
GPU_PYTHON := 3.12

.PHONY: help reproduce studies races test nightly wheel docs chaos bench gpu gpu-bundle performance readme clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

reproduce: $(READY) ## From a clone to data/report/index.html; later runs compute only what has changed
	@$(BIN)/python -m flows.reproduce

studies: $(READY) ## Parameter searches and other training sets, some hours; computes what is missing
	@$(BIN)/python -m flows.studies

races: $(READY) ## Compare the schedules on evidence at every draw, some hours; computes what is missing
	@$(BIN)/python -m flows.races

test: $(READY) ## Lint, contracts, types and tests
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy dsd flows benchmarks
	$(BIN)/pytest

nightly: $(READY) ## The tests that take longer: MARKER=slow, browser, ray or chaos
	$(BIN)/pytest -v -m $(MARKER)

wheel: $(READY) ## Build dist/, the same bytes at every build of a commit, and check it
	@rm -rf dist
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/uv build -q --out-dir dist .
	@$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz

docs: $(READY) ## Build the site of the docs in site/, with every link checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

chaos: $(READY) ## Kills, full disks and damaged files in mid-run; results must stay equal; half an hour
	$(BIN)/pytest -v -m chaos

bench: $(READY) ## Measure speed on this machine
	@$(BIN)/python -m benchmarks

gpu: $(READY) ## Measure correctness, speed and memory on this machine's GPU, in 7 minutes; measures what is missing
	@$(BIN)/python -m benchmarks.gpu --out $(GPU_RESULTS) --minutes 7

gpu-bundle: $(READY) ## Fill .gpu/ with what a GPU machine with torch and transformers lacks (GPU_PYTHON: its Python)
	@rm -rf $(GPU_BUNDLE)
	@$(BIN)/uv pip install -q --no-deps --only-binary :all: --python-version $(GPU_PYTHON) --python-platform linux \
	  --target $(GPU_BUNDLE) -c constraints.txt -r benchmarks/gpu/requirements.txt
	@du -sh $(GPU_BUNDLE)

performance: $(READY) ## Write docs/performance.md from the results of `make gpu`
	@$(BIN)/python -m benchmarks.performance --results $(GPU_RESULTS) --out docs/performance.md

readme: $(READY) ## Write the table and the figure of results in README.md
	@$(BIN)/python -m dsd.report.readme

clean: ## Remove what tools leave behind; the environment and the data stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build site *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The marker is written last: an environment that has it is complete.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	  || { echo "$(PYTHON) is not Python 3.11 to 3.13; name one that is: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(VENV) (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@# pip uses this machine's index settings for torch (e.g. a CPU build); uv is faster for the rest.
	@$(BIN)/pip install -qq --no-compile --disable-pip-version-check -c constraints.txt torch uv
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@
