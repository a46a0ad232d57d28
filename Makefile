# spectranb: everything a fresh clone needs is Python 3.11 or newer, make and a package index.
#
#   make demo     simulate a survey, train, predict, report (in .venv)
#   make test     sync check, notebooks, pytest (in .venv)
#   make help     the rest
#
# Another interpreter: make demo PYTHON=python3.12
# torch for CPUs only: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

VENV    ?= .venv
LATEST  ?= .venv-latest
OUT     ?= demo
DEMO    ?= --out $(OUT)
TORCH   ?= torch==2.13.0
BIN      = $(VENV)/bin
DEV      = $(BIN)/python -m spectranb.dev
PIP_FLAGS = --quiet --disable-pip-version-check --no-compile
COMPILE  = { $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true; }    # on all cores; pip would take one
SOURCES  = settings.ini setup.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help python demo install dev test test-latest notebooks readme sync docs-check clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' Makefile | sed -E 's/^([a-z-]+):.*## /make \1 : /' | awk -F ' : ' '{printf "%-18s %s\n", $$1, $$2}'

# The first interpreter that is new enough; PYTHON, when given, is the only one tried.
CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
FIND_PYTHON = for p in $(CANDIDATES); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; exit 0; }; done; \
	{ echo "spectranb needs Python 3.11 or newer. Tried:"; \
	for p in $(CANDIDATES); do echo "  $$p: $$("$$p" --version 2>/dev/null || echo not found)"; done; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12"; } >&2; exit 1

python:          ## the Python that would be used
	@$(FIND_PYTHON)

# A stamp is written when an installation is complete, so an interrupted one is done again and a complete one is not.
$(VENV)/made:
	@py=$$($(FIND_PYTHON)) && echo "making $(VENV) with $$py" && rm -rf $(VENV) && "$$py" -m venv $(VENV) && touch $@

$(VENV)/installed-mock: $(VENV)/made $(SOURCES)
	@echo "installing spectranb with its simulator into $(VENV)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) "$(TORCH)" -e '.[mock]' && $(COMPILE) && touch $@

$(VENV)/installed-dev: $(VENV)/made $(SOURCES)
	@echo "installing spectranb with its simulator and development tools into $(VENV)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev,mock]' && $(COMPILE) && touch $(VENV)/installed-mock $@

install: $(VENV)/installed-mock   ## .venv with the library and its simulator
dev: $(VENV)/installed-dev        ## .venv with the development tools as well

demo: $(VENV)/installed-mock      ## simulate a survey, train, predict, and write a report to demo/
	@$(BIN)/spectranb demo $(DEMO)

test: $(VENV)/installed-dev       ## sync check, nbdev_test of every notebook, pytest
	@$(DEV) test

# The library as its users get it: not editable, newest fastai and fastcore, run from another folder.
# build/ goes first: setuptools would pack modules from it that are gone.
test-latest:     ## the library with the newest fastai and fastcore, in .venv-latest
	@test -f $(LATEST)/made || { py=$$($(FIND_PYTHON)) && rm -rf $(LATEST) && "$$py" -m venv $(LATEST) && touch $(LATEST)/made; }
	@rm -rf build
	@$(LATEST)/bin/python -m pip install $(PIP_FLAGS) --upgrade "$(TORCH)" 'fastai>=2.8.12' 'fastcore>=2' .
	@cd tests && ../$(LATEST)/bin/python -P latest_smoke.py

notebooks: $(VENV)/installed-dev  ## run all notebooks and save their outputs
	@$(DEV) run

readme: $(VENV)/installed-dev     ## README.md from nbs/index.ipynb
	@$(DEV) readme

sync: $(VENV)/installed-dev       ## export the modules, clean the notebooks, make README.md
	@$(DEV) sync --fix

docs-check: $(VENV)/installed-dev ## plain pages of all notebooks in _docs/, without Quarto
	@$(DEV) docs-check

clean:           ## delete the environments and everything that was made
	rm -rf $(VENV) $(LATEST) $(OUT) _docs _proc build dist *.egg-info .pytest_cache .hypothesis
