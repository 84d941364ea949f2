# One way to do each thing. `make` alone lists them.
#
#   make test PY=python     use the environment you are in (conda, another venv) instead of .venv
#   make venv TORCH=...     another torch; see scripts/make_venv.sh for this and the other settings

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
JOBS ?= 2

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
else
# Somebody else's environment may have another checkout installed: this one goes first.
BIN := $(patsubst %/,%,$(dir $(shell command -v $(PY))))
INSTALLED :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

PYTEST := $(PY) -m pytest -n $(JOBS)
NBVAL := $(PYTEST) --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --dist loadscope
FIND_NOTEBOOKS := find notebooks cookbooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' 2>/dev/null | sort

# One thread a worker, and nothing fetched: a test that needs the network is a bug.
test pytest nbval test-fast: export OMP_NUM_THREADS := 1
test pytest nbval test-fast notebooks gpu-notebooks gpu-check: export HF_HUB_OFFLINE := 1
test pytest nbval test-fast notebooks gpu-notebooks gpu-check: export TOKENIZERS_PARALLELISM := false
# A progress bar is drawn when something takes over two seconds: recorded and new outputs would differ by chance.
nbval notebooks gpu-notebooks: export TQDM_DISABLE := 1

.PHONY: help venv graphviz chromium demo test test-fast pytest nbval lint types contracts format lab notebooks screenshots gpu-notebooks gpu-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# --- set up

venv: $(INSTALLED) ## Create .venv with adkit and its dev tools (Python 3.11 or newer)

$(VENV)/.installed: pyproject.toml constraints.txt scripts/make_venv.sh
	@bash scripts/make_venv.sh $(VENV)
	@touch $@

graphviz: ## Install the `dot` program if it is missing and this account may
	@bash scripts/system_package.sh dot apt-get=graphviz dnf=graphviz brew=graphviz

chromium: ## Install a browser for the browser tests if it is missing and this account may
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		bash scripts/system_package.sh chromium apt-get=chromium dnf=chromium brew=chromium

# --- see it work

demo: venv graphviz ## Run the demo model from HF config to text; the walk goes to walk.html
	$(BIN)/adkit run demo --prompt "What is 27 + 45?" --prompt "Once upon a time" --report walk.html

lab: venv graphviz ## Open the notebooks in JupyterLab
	$(PY) -m jupyter lab --notebook-dir=notebooks

# --- check

test: venv graphviz chromium lint types contracts pytest nbval ## Everything CI runs

test-fast: venv ## The inner loop: tests not marked slow, no notebooks
	$(PYTEST) -m "not slow" -q

pytest: venv ## The whole test suite
	$(PYTEST) -rs --durations=15

nbval: venv ## Re-run every notebook and compare its outputs with the recorded ones
	@notebooks=$$($(FIND_NOTEBOOKS) || true); \
	if [[ -z $$notebooks ]]; then echo "No notebooks yet."; exit 0; fi; \
	$(NBVAL) --durations=15 $$notebooks

lint: venv ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: venv ## mypy over the package
	$(PY) -m mypy

contracts: venv ## import-linter: a room imports only rooms on lower floors
	$(PY) -c 'from importlinter.cli import lint_imports_command as check; check()' --no-cache

# --- change things

format: venv ## Format the code and fix what ruff can fix
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

notebooks: venv graphviz ## Re-execute every notebook in place, recording its outputs (cells for a GPU keep theirs)
	@for notebook in $$($(FIND_NOTEBOOKS) || true); do \
		$(PY) -m jupyter nbconvert --to notebook --execute --inplace \
			--ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.record_timing=False \
			--ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.skip_cells_with_tag=gpu "$$notebook"; \
		$(PY) -m jupyter nbconvert --to notebook --inplace --coalesce-streams "$$notebook"; \
	done

screenshots: venv chromium ## Take the README's pictures anew (docs/images)
	$(PY) scripts/screenshots.py

gpu-notebooks: venv ## Record the notebooks' cells that need a GPU, on a machine that has one
	$(PY) scripts/gpu_notebooks.py

gpu-check: venv ## All that a GPU should prove and measure: tests, kernels, accuracy, speed; goes on where it stopped
	$(PY) scripts/gpu_check.py

clean: ## Remove .venv, caches and build products
	rm -rf $(VENV) .make build dist *.egg-info walk.html
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .adkit_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
