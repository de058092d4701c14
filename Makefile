# make demo: a guard on a real model, from nothing.   make test: every check, as CI runs it.
# make clients: an environment for other people's clients, whose tests are skipped without it.
PYTHON ?= python3
VENV ?= .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check fmt clients clean

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

clean:
	rm -rf $(VENV) $(CLIENTS) build dist .mypy_cache .pytest_cache .ruff_cache
