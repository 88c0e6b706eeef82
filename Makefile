# Triptych. `make run` opens the studio; the rest is for working on it.
#
#   make setup   .venv with everything: run-time packages, tests, lint, the reference library
#   make run     the studio at http://127.0.0.1:7860     ARGS="--port 8000 --vram 6"
#   make mcp     the same, its endpoints as tools for programs that speak MCP, too
#   make test    every test                              ARGS="tests/unit -k prompts"
#   make check   ruff, ruff format, pyright
#   make bench   measure against the reference           ARGS="--smoke"
#   make bench-gpu   every family on a GPU capped at each size of card: what is planned, what is measured
#
# PYTHON=/path/to/python3.12 picks the interpreter that .venv is made with.
# TORCH_INDEX=URL takes torch from that package index: on a machine without a GPU, torch's own CPU index saves
# the gigabytes of CUDA libraries that the default package brings along.

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup run mcp test check format bench bench-gpu
.DELETE_ON_ERROR:

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.dev

run: $(VENV)/.runtime
	$(BIN)/python app.py $(ARGS)

mcp: $(VENV)/.mcp
	$(BIN)/python app.py --mcp $(ARGS)

# Two processes of one thread each: more threads, or more processes than cores, wait for each other.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks --device cuda --parts memory $(ARGS)

# The stamps are written last, so an interrupted installation is taken up again by the next `make`.
$(VENV)/.runtime: requirements.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	      && echo "Making $(VENV) with $$("$$python" -V)" && exec "$$python" -m venv --clear $(VENV); \
	  done; \
	  echo "Triptych needs Python 3.11, 3.12 or 3.13 with its venv module" \
	    "(on Debian and Ubuntu: apt install python3-venv)," >&2; \
	  echo "and $(if $(PYTHON),$(PYTHON) is not that.,none was found. PYTHON=/path/to/python3 make ... names one.)" >&2; \
	  exit 1; }
	@echo "Installing the run-time packages (the first time takes some minutes)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.mcp: requirements-mcp.txt $(VENV)/.runtime
	$(PIP) -r requirements-mcp.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.mcp
	@echo "Installing the development packages"
	$(PIP) -r requirements-dev.txt
	@touch $@
