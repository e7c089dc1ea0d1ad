# `make demo` trains a small model on this machine; `make test` runs the tests.
# Another Python, in an environment of its own: make test PYTHON=python3.13 VENV=.venv313
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= test
export JAX_PLATFORMS ?= cpu

# Tests run in two processes, each of which compiles on a core of its own.
PYTEST := $(BIN)/python -m pytest -n 2 --dist=worksteal
PLANNING := $(addprefix tests/benchmarks/,context.py plan_memory.py plan_time.py published_recipes.py plan_search.py plan_maxtext.py plan_published.py maxtext_attention.py attention_blocks.py decode_bytes.py)

.PHONY: demo test test-all test-golden test-faults lint bench bench-plan docs site clean

demo: $(VENV)/installed
	$(BIN)/jaxgpt demo

test: $(VENV)/installed-$(EXTRAS)
	$(PYTEST)

test-all: $(VENV)/installed-$(EXTRAS)
	$(PYTEST) -m ""

# Old runs and default configs, whose losses are compared to the bit.
test-golden: $(VENV)/installed-$(EXTRAS)
	JAXGPT_TEST_GOLDEN=1 $(PYTEST) -m "" tests/golden

# Runs that are struck in every phase, and files that are damaged at random.
test-faults: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m tests.faults.crashes --strikes=230
	$(BIN)/python -m tests.faults.corruption --cases=400
	$(BIN)/python -m tests.faults.sweep_kills --kills=5

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-test,bench,data
	for f in $(filter-out $(PLANNING),$(wildcard tests/benchmarks/*.py)); do $(BIN)/python $$f || exit 1; done

bench-plan: $(VENV)/installed-test,tpu
	mkdir -p runs
	$(BIN)/python tests/benchmarks/context.py
	$(BIN)/python tests/benchmarks/attention_blocks.py
	$(BIN)/python tests/benchmarks/decode_bytes.py
	$(BIN)/python tests/benchmarks/plan_memory.py
	$(BIN)/python tests/benchmarks/plan_maxtext.py
	$(BIN)/python tests/benchmarks/plan_time.py
	$(BIN)/python tests/benchmarks/plan_published.py
	$(BIN)/python tests/benchmarks/plan_search.py --cache=runs/plan_search.json

docs: $(VENV)/installed
	$(BIN)/python -m jaxgpt.commands.reference

# The documentation as a website, with search and the API: build/site/index.html.
site: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf .venv* build *.egg-info .jax_cache runs

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("jaxgpt needs Python 3.11 or newer; make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-%: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $(VENV)/installed $@
