# make demo: a guard on a real model, from nothing.   make test: every check, as CI runs it.
# make clients: an environment for other people's clients, whose tests are skipped without it.
PYTHON ?= python3
VENV ?= .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check fmt clients peers-env clean

demo: $(VENV)/ready
	$(BIN)/latentguard demo

test: check clients
	$(BIN)/python -m pytest

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fmt: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

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
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
		--requirement constraints-clients.txt
	@touch $@

# For benchmarks/peers.py: two environments, since some libraries need transformers 4 and NumPy 1.
peers-env: .venv-peers/ready .venv-peers-4/ready

.venv-peers/ready: benchmarks/peers-constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --constraint $< torch==2.13.0
	.venv-peers/bin/python -m pip install --constraint $< --editable . \
	  nnsight transformer-lens alt-profanity-check
	@touch $@

# The package itself asks for transformers 5; there it runs from the source, PYTHONPATH=src.
.venv-peers-4/ready: benchmarks/peers-constraints-4.txt
	$(PYTHON) -m venv .venv-peers-4
	.venv-peers-4/bin/python -m pip install --constraint $< torch==2.13.0
	.venv-peers-4/bin/python -m pip install --constraint $< \
	  steering-vectors repeng accelerate httpx jaxtyping rich safetensors scipy
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) .venv-peers .venv-peers-4 build dist .mypy_cache .pytest_cache .ruff_cache
