# make demo    the main experiment on the synthetic stand-in scene, with gates and an HTML page
# make test    every test: the library notebooks, then pytest
# make lab     JupyterLab on the notebooks
# make export  notebooks -> modules and README.md, outputs removed
# make readme  nbs/index.ipynb -> README.md, and the pages that list notebooks and kept results
# make docs    everything as offline pages with search, in outputs/docs; no notebook is run; ARGS=--check opens each in Chromium
# make reproduce  the kept results of nbs/results: each with its command, those under 15 minutes run again; ARGS=--list only lists
# make bench   speed of the rasteriser
# make endure  mutated inputs for every reader, and commands killed at random moments: hours; ARGS="--out DIR --resume" continues
# make lint-js eslint over the JavaScript in kilonb/*/assets; needs Node.js
# make clean   remove the environment and caches; runs and data under outputs/ stay
#
# make TARGET ARGS="..." passes options on: demo ARGS="-p frame=3", test ARGS="-m 'not slow'", lab ARGS=--no-browser, bench ARGS=--json
# make TARGET PYTHON=python3.12 makes .venv with another interpreter

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# without busy waiting of OpenMP threads, which slows torch and numba down beside each other; see kilonb/__init__.py
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.complete

.PHONY: demo test lab export readme docs reproduce bench endure lint-js clean help

# Times measured on two cores of an AMD EPYC without a GPU, packages at hand: environment 1 min, scene 10 s, run 1.5 min.
demo: $(READY)
	@echo "the demo makes a small scene, fits a student to one view of it and writes the run's page: about 2 minutes on two cores"
	@$(BIN)/kilonb run single_view_overfit $(ARGS)

# Each in a process of its own: a device is registered with torch, and Triton's interpreter chosen, once in a process.
ALONE := nbs/fields/triton_networks.ipynb nbs/training/simulated_device.ipynb

# All are run even if one fails, so that pytest's summary is printed last; any failure fails the target. Pytest would begin
# with the files that have most tests; tests/conftest.py puts those first that take longest.
test: $(READY)
	@failed=0; $(BIN)/python tools/notebooks.py || failed=1; \
	started=; for own in $(ALONE); do MPLBACKEND=Agg $(BIN)/nbdev_test --path $$own & started="$$started $$!"; done; \
	for one in $$started; do wait $$one || failed=1; done; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) || failed=1; exit $$failed

lab: $(READY)
	@$(BIN)/jupyter lab nbs $(ARGS)

export: $(READY)
	@$(BIN)/python tools/export.py

readme: $(READY)
	@$(BIN)/python tools/readme.py

docs: $(READY)
	@$(BIN)/python tools/docs.py $(ARGS)

reproduce: $(READY)
	@$(BIN)/python tools/reproduce.py $(ARGS)

bench: $(READY)
	@$(BIN)/kilonb bench rasterize $(ARGS)

endure: $(READY)
	@$(BIN)/kilonb run endurance -p inputs=100_000 -p kills=500 $(ARGS)

lint-js:
	@$(PYTHON) tools/lint_assets.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache *.egg-info
	find kilonb tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n '/^SHELL/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# pip says nothing for a minute while it downloads a large file, and while it installs: a line every 8 s counts for it.
define INSTALL
log=.venv/install.log
say() {
    case "$$(tail -n 1 $$log 2>/dev/null)" in
        "WARNING: Retrying"*) echo "  pip cannot reach a package index and tries again, $$1 s: see $$log"; return ;;
    esac
    found=$$(grep -oE '^(Collecting|Processing|Installing collected)' $$log 2>/dev/null)
    case "$$found" in
        "") echo "  making .venv, $$1 s" ;;
        *"Installing collected") echo "  installing: $$(ls .venv/lib/python*/site-packages | grep -c 'dist-info$$') packages, $$1 s" ;;
        *) echo "  finding and downloading: $$(grep -cvF Installing <<<"$$found") packages, $$1 s" ;;
    esac
}
beat() { while sleep $${BEAT:-8} >/dev/null 2>&1; do say $$SECONDS; done; }
install() { $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt "$$@" >>$$log 2>&1; }
beat & heart=$$!
trap 'kill $$heart 2>/dev/null; wait $$heart 2>/dev/null' EXIT
[ -e $(READY) ] || $(PYTHON) -m venv --clear .venv || { echo "No environment could be made in .venv: on Debian and Ubuntu, apt install python3-venv."; exit 1; }
rm -f $(READY) $$log
install setuptools wheel && install --no-build-isolation -e '.[dev]' || { tail -n 15 $$log; echo "The setup of .venv failed; the output of pip is in $$log."; exit 1; }
endef
export INSTALL

# The stamp is written last: an environment without it is incomplete and is set up again.
$(READY): constraints.txt settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "KiloNB needs Python 3.11 or newer, and there is no '$(PYTHON)': install it, or name one by make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "KiloNB needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'): install one, or name one by make PYTHON=..."; exit 1; }
	@echo "setting up .venv from constraints.txt, once: $$(grep -c == constraints.txt) packages, 0.7 GB to download (several GB more with CUDA), 3 GB of disk, 1 minute of installing$(if $(filter demo,$(MAKECMDGOALS)),; then the demo: about 2 minutes)"
	@bash -c "$$INSTALL"
	@touch $@
