.POSIX:

PYTHON ?= python3
PORT ?= 3000
VENV = .venv
VERSIONS = 3.10 3.11 3.12 3.13
RESOLUTION = highest

BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PACKAGES = -e '.[local,schema-registry]' --group dev $(REST)
REST = --group docs -e ./example_project
TESTS = tests example_project/tests
# Processes that run the tests, each with a Kafka of its own; 0 runs them in pytest itself.
WORKERS = 2
# The environment keeps the Python that it was made with.
ifeq ($(origin PYTHON),command line)
$(shell \
  has=$$(sed -n 's/^version[_info]* *= *\([0-9]*\.[0-9]*\).*/\1/p' $(VENV)/pyvenv.cfg 2>/dev/null); \
  asked=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || :); \
  [ -z "$$has" ] || [ "$$has" = "$$asked" ] || \
    echo "$(VENV) has Python $$has, which goes on being used: for $(PYTHON), make it anew with rm -rf $(VENV)" >&2)
endif
QUIET = PYTHONWARNINGS='ignore:pkg_resources:UserWarning,ignore:Asset job publish_day:UserWarning'

.PHONY: help install demo ui test test-only test-faults test-browser bench lint matrix build docs screenshots clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## Make the environment .venv (the other targets do it themselves)

$(STAMP): pyproject.toml example_project/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or later is needed, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	  echo "Name another one, for instance: make PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) and installing the packages"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --resolution $(RESOLUTION) $(PACKAGES) || { \
	  [ $(RESOLUTION) = highest ] || exit 1; \
	  echo "uv could not install them; trying pip, which reads pip.conf"; \
	  $(BIN)/python -m pip install --quiet --upgrade pip && $(BIN)/python -m pip install --quiet $(PACKAGES); }
	@touch $(STAMP)

# `exec`: the signal that ends make goes to its child, which is to be no shell.
demo: $(STAMP) ## Publish one week of flights to a real Kafka through Dagster, and count them with Kafka's own tools
	@exec env $(QUIET) $(BIN)/python example_project/demo.py demo

ui: $(STAMP) ## Run Kafka and the Dagster UI together (PORT=3000), until Ctrl-C
	@exec env $(QUIET) $(BIN)/python example_project/demo.py ui --port $(PORT)

test: lint docs test-only ## Check style and types, build the docs, and run all tests but the faults, on a real Kafka

test-only: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not faults" $(TESTS)

test-faults: $(STAMP) ## Run the tests that break Kafka on purpose (minutes)
	$(BIN)/python -m pytest -m faults tests

test-browser: $(STAMP) ## Run the tests of the Dagster UI (needs Chromium)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group browser
	$(BIN)/python -m pytest -m browser tests/browser

bench: $(STAMP) ## Measure speed, memory and more beside other clients, and write the figures into docs/ (20 minutes)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group bench || $(BIN)/python -m pip install --quiet --group bench
	@$(BIN)/python -m benchmarks

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: ## Run the tests on each Python from 3.10 to 3.13 found here, and once with the lowest dependencies
	@ran=; failed=; missing=; oldest=; \
	try() { \
	  name=$$1; shift; echo "== $$name"; \
	  if $(MAKE) test-only "$$@"; then ran="$$ran $$name,"; else failed="$$failed $$name,"; fi; \
	}; \
	for version in $(VERSIONS); do \
	  found=; \
	  for python in python$$version "$$(pyenv root 2>/dev/null)"/versions/$$version.*/bin/python; do \
	    if "$$python" -c "import sys; sys.exit(sys.version_info[:2] != ($$(echo $$version | tr . ,)))" 2>/dev/null; \
	    then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then missing="$$missing $$version,"; continue; fi; \
	  oldest=$${oldest:-$$found}; \
	  try "Python $$version" "PYTHON=$$found" VENV=.venv-$$version; \
	done; \
	[ -z "$$oldest" ] || try "lowest dependencies" "PYTHON=$$oldest" VENV=.venv-lowest RESOLUTION=lowest-direct REST= TESTS=tests; \
	echo; echo "passed: $${ran:-none}"; echo "failed: $${failed:-none}"; echo "not found: $${missing:-none}"; \
	[ -n "$$ran" ] && [ -z "$$failed" ]

build: $(STAMP) ## Build the source distribution and the wheel into dist/, and try the wheel in a clean environment
	@rm -rf dist build/smoke
	@$(BIN)/uv build --quiet --out-dir dist
	@$(BIN)/python -m venv build/smoke
	@$(BIN)/uv pip install --quiet --python build/smoke/bin/python dist/*.whl
	@build/smoke/bin/python -I tests/smoke_install.py
	@rm -rf build/smoke; ls dist

docs: $(STAMP) ## Build the documentation into site/; a warning fails it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict && echo "Open site/index.html, or run: $(BIN)/mkdocs serve"

screenshots: $(STAMP) ## Take the README's screenshots anew (needs Chromium)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group browser
	@$(BIN)/python docs/screenshots.py

clean: ## Remove all that these targets made
	rm -rf .venv .venv-* .dagster_home dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
