# Everything a user runs. `make help` lists it.

CONFIG ?= configs/demo.toml
SOURCE ?= embedded
ARGS ?=
NPROC ?= 1
DEVICE ?= cpu
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(GPU),yes)
  # an NVIDIA GPU: Python >= 3.12; CUDA=12 takes the CUDA 12 builds of JAX
  PYTHON ?= python3.12
  CUDA ?= 13
  EXTRA = cuda$(CUDA)
  MACHINE = cuda$(CUDA)
  MINIMUM = 3, 12
else
  PYTHON ?= python3
  EXTRA =
  MACHINE = cpu
  MINIMUM = 3, 11
endif
comma := ,
VENV ?= .venv
BIN = $(VENV)/bin
# PyTorch's own package index for small CPU builds, as its installation page gives it
TORCH_INDEX ?=
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/$(MACHINE).txt \
      $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help setup prepare doctor train-jax train-torch parity test test-slow test-gpu parity-throughput bench-kernels bench-loader bench-store lint format oracle clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.base  ## install twinfold into .venv

$(VENV)/.base: pyproject.toml constraints/$(MACHINE).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(MINIMUM)))' || \
	  { echo "twinfold needs Python >= $(subst $(comma) ,.,$(MINIMUM)) here, and $(PYTHON) is not: set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing twinfold into $(VENV) (about a minute) ..."
	@$(PIP) -e ".$(if $(EXTRA),[$(EXTRA)])"
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(PIP) -e ".[dev$(if $(EXTRA),$(comma)$(EXTRA))]"
	@touch $@

$(VENV)/.oracle: $(VENV)/.dev
	@$(PIP) -e ".[oracle$(if $(EXTRA),$(comma)$(EXTRA))]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps alphafold==2.0.0
	@touch $@

oracle: $(VENV)/.oracle  ## install DeepMind's published code, which the tests compare with

prepare: setup  ## pack SOURCE (folders or URLs) into STORE, which trains faster
	@$(BIN)/python -m foldcore.data.prepare $(SOURCE) --out $(or $(STORE),$(error set STORE, the folder to write)) $(ARGS)

doctor: setup  ## explain a data set: SOURCE or STORE; ARGS="--gpus 8 --html report.html"
	@$(BIN)/python -m foldcore.data.doctor $(or $(STORE),$(SOURCE)) $(ARGS)

train-jax: setup  ## train CONFIG (the demo by default) in JAX; ARGS="train.steps=10"
	@$(BIN)/python -m jaxfold.train $(CONFIG) $(ARGS)

train-torch: setup  ## the same in PyTorch; two processes, one for each GPU: NPROC=2 ARGS="train.batch_size=2"
	@$(BIN)/python $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node=$(NPROC)) \
	  -m torchfold.train $(CONFIG) $(ARGS)

parity: oracle  ## prove both tracks equal, and equal to DeepMind's code; DEVICE=gpu at full size
	@$(BIN)/python -m parity.compare --device $(DEVICE) $(ARGS)

test: oracle  ## the test suite: allow 15 minutes on two cores
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: oracle  ## the tests that take longer
	@$(BIN)/python -m pytest -m slow

test-gpu: oracle  ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu

parity-throughput: setup  ## step times of both tracks, time by module, gaps; ARGS="--no-modules"
	@$(BIN)/python -m parity.throughput $(ARGS)

bench-kernels: setup  ## times and errors of the kernels beside their peers, on an NVIDIA GPU
	@$(BIN)/python -m parity.bench_kernels $(ARGS)

bench-loader: setup  ## the loader beside PyTorch's, with a tail of slow examples (about 3 minutes)
	@$(BIN)/python -W ignore -m parity.bench_loader $(ARGS)

bench-store: setup  ## the packed store of SOURCE beside its raw files
	@$(BIN)/python -m parity.bench_store $(SOURCE) $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.dev  ## let ruff format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:  ## remove .venv and caches; runs/ is kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
