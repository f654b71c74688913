# Everything that one does with this repository. `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
VENV_ALL := .venv-all
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export DVC_NO_ANALYTICS := true
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
# The processes that stages and tests start read what the first one has compiled.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadgroup \
  --max-worker-restart 0

.PHONY: help repro test test-all models lint format types docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

repro: $(VENV)/.installed  ## environment, the whole pipeline on the bundled model, the table and the page
	quantline repro

test: $(VENV)/.installed  ## the tests that have to pass
	$(PYTEST) -m "not slow"

# llm-compressor, whose files ours are held against, wants another transformers: it has one more
# environment, that of the benchmarks.
PEER := from benchmarks.quality.peers import peer_python; peer_python("llmcompressor")

test-all: $(VENV_ALL)/.installed  ## all tests, with every extra, in an environment of its own
	$(VENV_ALL)/bin/python -c '$(PEER)'
	PATH="$(CURDIR)/$(VENV_ALL)/bin:$$PATH" $(PYTEST)

models: $(VENV)/.installed  ## a tiny model of every architecture through the stages; docs/models.md
	python -m benchmarks.models

lint: $(VENV)/.installed  ## ruff and the import contracts
	ruff check .
	ruff format --check .
	lint-imports

format: $(VENV)/.installed  ## put the code into its form
	ruff check --fix .
	ruff format .

types: $(VENV)/.installed  ## mypy
	mypy

docs: $(VENV)/.installed  ## the documentation, as docs/_build/html/index.html
	sphinx-build -W --keep-going -q -b html docs docs/_build/html

# llama.cpp is built for this processor, without AMX: virtual machines announce it and then trap on
# its instructions. pip's cache does not know for which processor and with which options a wheel in
# it was built. The converter is kept from the same source.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
LLAMA_CPP_BUILD := -DLLAVA_BUILD=OFF '-DCMAKE_C_FLAGS=$(NO_AMX)' '-DCMAKE_CXX_FLAGS=$(NO_AMX)'

# torch comes first and alone: with it in place, no other package can draw in another build of
# several gigabytes.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "expected Python 3.11, found $(PYTHON): $$($(PYTHON) --version); install python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --upgrade pip
	$(1)/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	rm -rf $(1)/llama.cpp
	$(1)/bin/pip download --quiet --no-deps --no-binary llama_cpp_python --dest $(1)/llama.cpp \
	  $$(grep '^llama_cpp_python==' requirements.lock)
	CMAKE_ARGS="$(LLAMA_CPP_BUILD)" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(1)/bin/pip wheel --quiet \
	  --no-deps --no-cache-dir --wheel-dir $(1)/llama.cpp $(1)/llama.cpp/*.tar.gz
	$(1)/bin/pip install --quiet --no-deps --no-index --find-links $(1)/llama.cpp \
	  $$(grep '^llama_cpp_python==' requirements.lock)
	$(1)/bin/pip install --quiet -r requirements.lock
	$(1)/bin/pip install --quiet --no-deps --editable .
	$(1)/bin/python -m quantline.formats.gguf.converter.release $(1)/llama.cpp/*.tar.gz
	rm -rf $(1)/llama.cpp
endef

$(VENV)/.installed: requirements.lock pyproject.toml
	$(call install,$(VENV))
	touch $@

$(VENV_ALL)/.installed: requirements.lock pyproject.toml
	$(call install,$(VENV_ALL))
	$(VENV_ALL)/bin/pip install --quiet '.[genai,gptqmodel,lm-eval,optuna,ray,s3-test,slurm]'
	$(VENV_ALL)/bin/pip install --quiet --no-deps --editable .
	touch $@

clean:  ## what the pipeline makes; the environment, the history of runs and the events stay
	rm -rf artifacts metrics reports docs/_build
