# make demo | make test | make quality | make style: each creates .venv and installs what it needs on first use.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/.installed
PATHS = *.py sketch_perceptual tests benchmarks

.PHONY: demo test quality style

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest

quality: $(INSTALLED)
	$(BIN)/ruff check $(PATHS)
	$(BIN)/ruff format --check $(PATHS)

style: $(INSTALLED)
	$(BIN)/ruff check --fix $(PATHS)
	$(BIN)/ruff format $(PATHS)
