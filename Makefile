# make quickstart, make test: each sets up its own virtual environment (.venv) first. Nothing else is needed than
# Python 3.11+, a C++ compiler and make; with nvcc on PATH the CUDA kernels are built too (RLHF_FAST_CUDA=0 to skip).
PYTHON ?= python3
VENV   ?= .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
SOURCES := pyproject.toml $(CONSTRAINTS) setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: quickstart test lint format bench peers gpu clean

quickstart: $(VENV)/.report
	$(BIN)/rlhf-fast quickstart

# A worker for each core, so one thread for each worker: two would wait for each other. With the oldest versions that
# pyproject.toml allows (several GB on Linux): make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Ours, PyTorch, torch.compile and TRL, into bench/results, README and docs/benchmarks.md. This takes minutes, and its
# figures are only true on an idle machine.
# A second machine: make bench RESULTS=bench/results/cpu_amd.json; docs/benchmarks.md then shows both.
RESULTS ?= bench/results/cpu.json
bench: $(VENV)/.bench
	OMP_WAIT_POLICY=PASSIVE $(BIN)/rlhf-fast bench --device cpu --json $(RESULTS)
	$(BIN)/python bench/report.py

# On a machine with an NVIDIA GPU: build with nvcc, run every test that needs one, measure every op, and PPO whole.
# PART="build test" takes some parts, of ten minutes at most each (bench/gpu.py); WITHIN=560 ends all of them in time,
# KEEP=folder has the results there too. Where $(PYTHON)'s torch sees the GPU nothing is installed but the peers, into
# build/peers-gpu; PEERS=folder names another. docs/benchmarks.md gets what was
# measured, whatever failed.
gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) $(VENV)/.bench && python=$(BIN)/python; fi && \
	{ $$python bench/gpu.py $(if $(PART),--part $(PART)) $(if $(WITHIN),--within $(WITHIN)) \
	$(if $(KEEP),--keep $(KEEP)); code=$$?; \
	$$python bench/report.py || code=1; exit $$code; }

# compat beside the functions it stands in for: TRL, verl and OpenRLHF from PyPI, each in a folder of its own.
peers: $(VENV)/.test
	$(BIN)/python tests/peers/run.py

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) build dist *.egg-info rlhf_fast/*.so

# Editable, so that Python changes count at once; a changed native source runs this again and rebuilds only that.
$(VENV)/.report: EXTRAS := report
$(VENV)/.test: EXTRAS := report,test,dev
$(VENV)/.bench: EXTRAS := report,test,dev,bench
$(VENV)/.report $(VENV)/.test $(VENV)/.bench: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $(VENV)/.report $@
