# Two commands do everything on a fresh machine: `make demo` and `make test`. The first run of either makes .venv and
# installs the versions of constraints.txt into it; later runs reuse it. Only python3 (3.10 or newer) is needed.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted installation never counts as one. It holds the folder it was made in: a copied or
# moved checkout makes its own .venv instead of running the original's code.
STAMP := $(VENV)/.installed
# The libraries that benchmarks compare with; without them they are left out.
PEERS := $(VENV)/.peers
# What the documentation is built with.
SITE := $(VENV)/.site
ifneq ($(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null),$(CURDIR))
STALE := stale
endif

# Tests run in as many processes as there are cores, up to 8: each one imports torch.
PYTEST_FLAGS ?= -n auto --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help demo test test-trainers check format docs docs-serve bench clean stale

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is handed on: make demo ARGS="--plot demo.png", make test ARGS="-k losses"'

demo: $(STAMP) ## the main job: whole batch, textbook loop and library side by side
	@echo "$(VENV) is ready: gradaccum demo $(ARGS)"
	@$(BIN)/gradaccum demo $(ARGS)

test: $(STAMP) ## all tests
	@echo "$(VENV) is ready: pytest $(ARGS)"
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) $(ARGS)

# Beside .venv, which it sees: what VERSIONS says comes first, and nothing of .venv changes.
OTHER := $(VENV)/trainers
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

test-trainers: $(STAMP) ## tests/integrations against other versions: VERSIONS="transformers==5.0.0"
	@rm -rf $(OTHER)
	@$(BIN)/python -m venv $(OTHER)
	@echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(OTHER)/bin/python $(PURELIB))/main.pth"
	@$(OTHER)/bin/python -m pip install -qq --disable-pip-version-check $(VERSIONS)
	@$(OTHER)/bin/python -m pytest tests/integrations $(ARGS)

check: $(STAMP) ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## put imports and layout in order
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

docs: $(SITE) ## the documentation as a site, in site/; every warning is an error
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(SITE) ## the same in a browser, built again whenever a page changes
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

bench: $(PEERS) ## all benchmarks, one to two hours alone on the machine; with ARGS=--quick 5 minutes
	@$(BIN)/gradaccum bench
	@$(BIN)/python benchmarks/all.py $(ARGS)

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The old stamp goes first and the new one comes last: without one, the next run starts from an empty .venv.
$(STAMP): pyproject.toml constraints.txt $(STALE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "gradaccum needs Python 3.10 or newer, and '$(PYTHON)' is not. Name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if test -d $(VENV) && test ! -f $(STAMP) -o -n "$(STALE)"; then \
	  echo "Removing $(VENV): unfinished, or made for another folder"; rm -rf $(VENV); fi
	@rm -f $(STAMP)
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch and the development tools into $(VENV) (once; takes a minute or a few)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo '$(CURDIR)' > $@

$(SITE): $(STAMP)
	@echo "Installing what builds the documentation into $(VENV) (once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

$(PEERS): $(STAMP)
	@echo "Installing the libraries to compare with into $(VENV) (once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,bench]' && touch $@ || \
	  echo "They could not be installed, so they are left out"
