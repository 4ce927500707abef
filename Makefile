# make test   set up .venv and run every check     make demo   set up .venv and fit a real screen
# make docs   build the documentation: site/index.html   make coverage   the tests, with lines counted
# Another interpreter:  make test PYTHON=python3.12 VENV=.venv312
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
LINKS := $(VENV)/links
CODE := pyro_causalcell models guides tests examples benchmarks docs/hooks.py
SETTINGS := setup.cfg pyproject.toml constraints.txt

.PHONY: test style types imports links unit coverage docs notebooks demo bench clean

test: style types imports unit

# ---------------------------------------------------------------- environment

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(SETTINGS) | $(PY)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(SETTINGS) | $(PY)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[docs,interpret,temporal,test]'
	touch $@ $(VENV)/.core

# ---------------------------------------------------------------- checks

style: $(VENV)/.test
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check $(CODE)

# mypy and import-linter do not see where setup.cfg says that models/ and guides/ belong, so they read a
# folder of links in which they already lie there.
links: $(VENV)/.test
	rm -rf $(LINKS)
	mkdir -p $(LINKS)/pyro_causalcell
	ln -s "$(CURDIR)"/pyro_causalcell/* "$(CURDIR)"/models "$(CURDIR)"/guides $(LINKS)/pyro_causalcell/

types: links
	cd $(LINKS) && ../bin/python -m mypy --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache"

imports: links
	cd $(LINKS) && ../bin/lint-imports --config "$(CURDIR)/pyproject.toml" --no-cache --no-logo

# One thread per worker: small matrices are slower on many, and the workers share the cores.
unit: $(VENV)/.test
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(PY) -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

# The same tests with every line counted, which takes them half as long again.
coverage: PYTEST_ARGS += --cov --cov-report=term --cov-fail-under=90
coverage: unit

# ---------------------------------------------------------------- documentation (the unit tests build it too)

docs: links
	LINKS=$(LINKS) NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Runs every example at full size and keeps what it prints and draws.
notebooks: $(VENV)/.test
	$(PY) -m jupytext --to ipynb --set-kernel python3 examples/*.py
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore:IProgress $(PY) -m nbconvert --to notebook --inplace --execute \
		--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=-1 examples/*.ipynb

# ---------------------------------------------------------------- use

demo: $(VENV)/.core
	$(VENV)/bin/pyro-causalcell demo --out demo

bench: $(VENV)/.core
	$(PY) benchmarks/step_time.py
	$(PY) benchmarks/loading.py

clean:
	rm -rf $(VENV) build dist site *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
