# One door to everything: each target builds the environment it needs, once.
# Needs only make, git and Python 3.11, 3.12 or 3.13. `make help` lists the targets.

# The interpreter to build .venv from; `make setup PYTHON=/path/to/python3.12` overrides it.
SUITS := import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c '$(SUITS)' && { echo $$p; break; }; done)

# `make clean setup CONSTRAINTS=constraints.txt` installs the direct dependencies at the versions
# that were tested; without it uv takes the newest ones that pyproject.toml allows.
CONSTRAINTS ?=

# Processes that share the tests, each taking the next file that nobody has taken. One more than
# the two cores they were timed on: tests that start runtimes wait for them a good part of their time.
TESTERS ?= 3

PACKAGES := leakbed attacks defenses strategies clients experiments
BENCHMARKS := split_steps hijacked_steps fedavg_round scale wire unsplit_targets label_rows
BIN := .venv/bin

# Versions of Flower under which a stranger's app is tapped, each in an environment of its own.
FLOWERS ?= 1.21.0 1.30.0 1.36.0 1.41.0 newest

# Flower reports usage unless told otherwise; a run here should also work without a network.
export FLWR_TELEMETRY_ENABLED ?= 0
# Without byte code each process that imports torch takes 6 s longer, and the tests start many.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-cuda test-flower-versions lint coverage check bench readme clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-21s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.stamp  ## build .venv with everything in it (1 to 4 minutes, 7 GB); again only if pyproject.toml changed

demo: setup  ## the main job: what FedAvg weights and split activations leak, as a report
	$(BIN)/leakbed compare --out runs/demo

# A tester that dies ends the run: replacing one near the end can leave pytest-xdist waiting for ever.
PYTEST := $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder \
	--max-worker-restart=0

test: setup  ## run every unit test, and one test each of Ray, `flwr run` and a deployment (5 minutes)
	$(PYTEST) -m "smoke or not (runtime or cuda or reproduces)"

test-all: setup  ## run all tests, once on a pretended GPU too, except those that repeat a paper's number
	$(PYTEST) -m "not reproduces" --cov --cov-report=

test-cuda: setup  ## everything once on a pretended GPU, then the unit tests there
	$(BIN)/python -m pytest -m cuda
	PRETENDED_GPUS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests/support \
		$(PYTEST) -m "not cuda and not runtime and not reproduces"

test-flower-versions:  ## tap an app under each supported version of Flower (1 minute each)
	@for version in $(FLOWERS); do \
		folder=.flowers/$$version; wanted="flwr==$$version"; \
		test $$version != newest || { wanted=flwr; rm -rf $$folder; }; \
		test -d $$folder || "$(PYTHON)" -m venv $$folder || exit 1; \
		$$folder/bin/python install.py "$$wanted" numpy safetensors || exit 1; \
		traces=$$(mktemp -d) && PYTHONPATH=. $$folder/bin/python -m tests.support.tapped_anywhere $$traces \
			2>$$traces/log || { cat $$traces/log; exit 1; }; rm -rf $$traces; \
	done

lint: setup  ## format, lint, types, docstrings, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pydoclint $(PACKAGES)
	$(BIN)/lint-imports

coverage: setup  ## refuse a branch coverage under 90 % in the last `make test-all`
	$(BIN)/coverage report --fail-under=90

check: lint test-all coverage  ## every gate, as in .ci/run

bench: setup  ## measure speed, memory and bytes on the wire; prints a table (8 minutes)
	@mkdir -p runs/bench
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name > runs/bench/$$name.jsonl || exit 1; \
		cat runs/bench/$$name.jsonl; done
	cat $(BENCHMARKS:%=runs/bench/%.jsonl) > runs/bench.jsonl
	$(BIN)/python -m benchmarks.table show runs/bench.jsonl

readme: setup  ## write the tables of README.md, docs/settings.md and docs/speed.md again
	$(BIN)/python -m experiments.catalogue README.md
	$(BIN)/python -m experiments.reference docs/settings.md
	$(BIN)/python -m benchmarks.table write docs/speed.md

clean:  ## remove the environment, caches and runs
	rm -rf .venv .flowers runs .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# Order-only: install.py updates an environment that exists, so only its absence builds one.
.venv/.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing Leakbed and its dependencies into .venv (1 to 4 minutes, 7 GB)"
	@$(BIN)/python install.py $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(SUITS)' || { \
		echo "Leakbed needs Python 3.11, 3.12 or 3.13; seen: $$(exec 2>/dev/null; $(or $(PYTHON),python3) --version || echo none)."; \
		echo "Install one, or name it: make setup PYTHON=/path/to/python3.12"; exit 1; }
	@"$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot build environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
