# The project's commands; `make` alone lists them. Nothing has to be installed first but Python 3.10 to 3.12.

PYTHON ?= python3
VENV ?= .venv
# "no" goes without Detectron2, and uninstalls it where it is installed.
DETECTRON2 ?= yes
PYTEST_ARGS ?=
# Waiting threads sleep: where others want the cores too, spinning ones make everything many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

python := $(VENV)/bin/python
# Stamps of finished steps; the last one remembers which way Detectron2 was asked for.
installed := $(VENV)/.kg-installed
built := $(VENV)/.kg-built
ready := $(VENV)/.kg-ready-detectron2-$(DETECTRON2)

ifeq ($(filter yes no,$(DETECTRON2)),)
$(error DETECTRON2 is yes or no, not "$(DETECTRON2)")
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test sanitize gpu lint clean
.NOTPARALLEL:
# A half-made environment must not pass for a whole one.
.DELETE_ON_ERROR:

help:  ## list these commands
	@echo "make COMMAND [PYTHON=$(PYTHON)] [VENV=$(VENV)] [DETECTRON2=yes|no] [PYTEST_ARGS=...]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile

setup:  ## install everything into VENV, and look for Detectron2 (again); the commands below do it where needed
	@rm -f $(ready)
	@$(MAKE) --no-print-directory $(ready)

demo: $(ready)  ## make cells, train on them, compare with Mask R-CNN, draw a picture
	$(python) tools/demo.py

test: $(ready)  ## run the tests; PYTEST_ARGS goes to pytest, for example PYTEST_ARGS="--slow"
	$(python) -m pytest -q --durations=10 --numprocesses auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

sanitize: $(ready)  ## run the tests of the C++ operators with the address and undefined-behaviour sanitizers
	$(python) tools/sanitize.py

gpu: $(ready)  ## on a machine with a GPU: build, test, sanitize, measure, train; results go to results/gpu
	$(python) tools/gpu.py

lint: $(installed)  ## check style, layout and types of the code
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	find kg_detectron tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror

clean:  ## remove caches and build products; VENV stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis kg_detectron/layers/_C.* $(built)
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# Every candidate is run, because a name on the PATH may be a launcher with no Python behind it.
$(python):
	@for candidate in $(PYTHON) python3.12 python3.11 python3.10; do \
	    if $$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	        echo "Making $(VENV) with $$candidate: $$($$candidate --version)"; \
	        exec $$candidate -m venv $(VENV); \
	    fi; \
	done; \
	echo "kg_detectron needs Python 3.10, 3.11 or 3.12; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)," \
	    "and there is no python3.12, python3.11 or python3.10. Name one: make setup PYTHON=/path/to/python3.11" >&2; \
	exit 1

# The build tools come first and build everything (--no-build-isolation), so that they are the pinned ones as well.
$(installed): setup.py pyproject.toml constraints.txt | $(python)
	$(python) -m pip install --constraint constraints.txt pip setuptools wheel ninja
	$(python) -m pip install --constraint constraints.txt --no-build-isolation --editable '.[dev,detectron2]'
	@touch $@

# Again in the open, for pip hides what was built; only what has changed is compiled again.
$(built): $(installed) $(shell find kg_detectron/layers/csrc -type f)
	$(python) setup.py build_ext --inplace
	@touch $@

$(ready): $(built) tools/install_detectron2.py
	@rm -f $(VENV)/.kg-ready-*
	$(python) tools/install_detectron2.py $(if $(filter no,$(DETECTRON2)),--without)
	@touch $@
