# make repro: the whole pipeline on the bundled model.   make test: the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export DVC_NO_ANALYTICS := true
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: repro test clean

repro: $(VENV)/.installed
	quantline repro

test: $(VENV)/.installed
	python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# llama.cpp is built for this processor, without AMX: virtual machines announce it and then trap on its instructions.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
LLAMA_CPP_BUILD := -DLLAVA_BUILD=OFF '-DCMAKE_C_FLAGS=$(NO_AMX)' '-DCMAKE_CXX_FLAGS=$(NO_AMX)'

# torch comes first and alone: with it in place, no other package can draw in another build of several gigabytes.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "expected Python 3.11, found $(PYTHON): $$($(PYTHON) --version); install python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --upgrade pip
	pip install --quiet $$(grep '^torch==' requirements.lock)
	CMAKE_ARGS="$(LLAMA_CPP_BUILD)" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) pip install --quiet -r requirements.lock
	pip install --quiet --no-deps --editable .
	touch $@

# What the pipeline makes; the environment, the history of runs and the events stay.
clean:
	rm -rf artifacts metrics reports
