# Each target makes .venv when it is missing, installs requirements.txt when that file changed, and runs.
# Flags go through ARGS:  make train ARGS="--suite libero_spatial --seed 1"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
SUITE ?= libero_object
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help start train eval test test-fast bench clean-cache libraries

help: ## show this list
	@echo 'usage: make TARGET [ARGS="--flag value ..."]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' Makefile | expand -t 14

start: libraries ## imitation policy and reward model of a suite that checkpoints/ lacks (SUITE=libero_90)
	@PY=$(PY) scripts/start.sh $(SUITE)

train: libraries ## reinforcement learning from the shipped tiny policy (train.py)
	@$(PY) train.py $(ARGS)

eval: libraries ## success rates under the LIBERO protocol (eval.py)
	@$(PY) eval.py $(ARGS)

bench: libraries ## the benchmarks that README quotes (bench/), for example ARGS=envs
	@$(PY) -m bench $(ARGS)

test: libraries ## all tests
	@$(PY) -m pytest -q -n 2 --dist worksteal $(ARGS)

test-fast: $(READY) ## the tests that need neither the simulator nor patience
	@$(PY) -m pytest -q -n 2 --dist worksteal -m "not libero and not slow" $(ARGS)

clean-cache: $(READY) ## delete compiled tasks and simplified meshes (8 MB a task); the next start makes them again
	@$(PY) -c "import shutil; from support.machine import cache_dir; print(cache_dir()); shutil.rmtree(cache_dir(), ignore_errors=True)"

libraries: $(READY)
	@$(PY) -c "from support.machine import require_system_libraries; require_system_libraries()"

$(READY): requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 on the PATH; set one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON) is older than Python 3.11; set one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || { echo "Creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); } || \
		{ echo "error: cannot create $(VENV); on Debian or Ubuntu: sudo apt-get install python3.11-venv" >&2; exit 1; }
	@echo "Installing requirements.txt into $(VENV) (minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)
