# Each target works on a fresh clone: it makes the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-deployment check bench docs hub clean

demo: $(VENV)/installed  ## train on handwritten digits with four simulated nodes, a few minutes on two cores
	$(BIN)/feddm run local

test: $(VENV)/installed  ## every test but those with real nodes, a process of tests for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-deployment: $(VENV)/installed  ## real SuperNodes with TLS, killed, cut off and lied to; half an hour
	$(BIN)/python -m pytest tests/deployment

check: $(VENV)/installed  ## format, lint, types, import rules, manifests, links of the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_manifests.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir "$$(mktemp -d)/site"

bench: $(VENV)/installed  ## has anything become slower? ratios against those kept for this kind of machine
	$(BIN)/python -W ignore benchmarks/guard.py

docs: $(VENV)/installed  ## write docs/configuration.md from the typed configuration, and the site with the API reference
	$(BIN)/python docs/write_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	@echo "Installing into $(VENV) (torch is large; this takes a minute or several) …"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

hub: $(VENV)/installed  ## a copy to publish on Flower's Hub: make hub PUBLISHER=account REPOSITORY=https://github.com/owner/name
	$(BIN)/python docs/write_hub.py build/feddm-flwr --publisher '$(PUBLISHER)' --repository '$(REPOSITORY)'

clean:
	rm -rf $(VENV)
