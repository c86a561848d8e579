# Two commands for a newcomer: `make demo` and `make test`. Everything lives in $(VENV); `make clean` removes it.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin

# Python compiles what is imported, once; compiling all that is installed takes as long as installing it
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --quiet --no-compile
MADE := $(VENV)/.made
DEMO_READY := $(VENV)/.installed-demo
DEV_READY := $(VENV)/.installed-dev
# two processes of one thread each (tests/conftest.py): the tests' networks are too small to share out
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-quick lint format docs bench clean

demo:
	@start=$$(date +%s); $(MAKE) --no-print-directory $(DEMO_READY) && \
	echo "set-up: $$(( $$(date +%s) - start )) s (not part of the demo's time)"
	@$(BIN)/isthmus demo

test: $(DEV_READY)
	$(PYTEST)

# without checking shapes at run time, which takes as long as the tests themselves; `make test` does
test-quick: $(DEV_READY)
	JAXTYPING_DISABLE=1 $(PYTEST) -m "not slow"

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

bench: $(DEV_READY)
	$(BIN)/python benchmarks/next_scale.py
	$(BIN)/python benchmarks/dar.py

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find isthmus tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE):
	@test -n "$(PYTHON)" || { echo "Isthmus needs Python 3.11 or newer, found none: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Isthmus needs Python 3.11 or newer, got $$("$(PYTHON)" -V): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "making $(VENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(DEMO_READY): $(MADE) pyproject.toml constraints.txt
	@echo "installing Isthmus and what the demo needs into $(VENV) (a few minutes, once)"
	@$(PIP) -c constraints.txt -e '.[demo]'
	@touch $@

# dev contains demo
$(DEV_READY): $(MADE) pyproject.toml constraints.txt
	@echo "installing Isthmus and the development tools into $(VENV) (a few minutes, once)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $(DEMO_READY) $@
