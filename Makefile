# Everything a fresh machine needs is git, make and Python >= 3.11; each target sets up what it uses.
# PYTHON chooses the interpreter:  PYTHON=python3.12 make test

PYTHON ?= python3
INTERPRETER := $(shell tools/find-python $(PYTHON))
ifeq ($(INTERPRETER),)
$(error No Python >= 3.11 answers to '$(PYTHON)')
endif
VERSION := $(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile -q
# Collecting every file would take longer than these tests.
FULL_CODEGEN = $(shell grep -rl --include='test_*.py' 'mark.full_codegen' tests)
PART ?= 1/6
LIBRARY_TESTS := layout_optax sage_optax lorapre_optax tests/layout tests/sage tests/lorapre tests/sharding tests/compatibility

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-distributed test test-all test-part test-library test-frameworks lint format wheel plan bench-sinkhorn bench-collectives bench-step-time bench-memory bench-lorapre bench-faithfulness bench-quality bench-finetuning bench-lowering bench-mfu bench-accelerator faults figures docs docs-serve clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'
	@echo "  The environment is $(VENV), made from $(INTERPRETER); PYTHON=... chooses another."

setup: $(READY) ## Make the virtual environment (the other targets do it themselves)

$(READY): pyproject.toml constraints.txt
	@echo "== Setting up $(VENV) from $(INTERPRETER) (a few minutes the first time, reused afterwards)"
	@$(INTERPRETER) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[example,tests,lint]'
	@touch $@
	@echo "== $(VENV) is ready"

demo: $(READY) ## Train a small Llama with AdamW, Lion-Hybrid and SAGE-Hybrid on real text (<= 10 minutes)
	@echo "== Training the demo Llama on this interpreter's standard library, one optimizer after the other;"
	@echo "== finished runs in out/demo are kept (make demo ARGS=--no-resume starts over)"
	@$(BIN)/python -m examples.llama.compare --preset demo --steps 150 --time-budget 8 --out out/demo \
		--optimizers adamw,lion_hybrid,sage_hybrid,sage_hybrid_int8 $(ARGS)

demo-distributed: $(READY) ## Train the demo in two processes of four simulated devices; compare with one process
	@$(BIN)/python -m benchmarks.meshes.two_processes $(ARGS)

test: $(READY) ## Prove every formula, golden vector, promise and error message once (some eight minutes on two cores)
	@echo "== Running the tests on Python $(VERSION), first with quick code generation"
	@TEST_CODEGEN=quick $(PYTEST) -m "not extended" $(ARGS)
	@echo "== Running the tests of bits, bytes and long loops with full code generation"
	@$(PYTEST) -m "full_codegen and not extended" $(FULL_CODEGEN) $(ARGS)

test-all: $(READY) ## Run the whole suite: make test, and longer trainings, deaths of processes, every mode of the grid
	@echo "== Running all tests on Python $(VERSION), first with quick code generation"
	@TEST_CODEGEN=quick $(PYTEST) $(ARGS)
	@echo "== Running the tests of bits, bytes and long loops with full code generation"
	@$(PYTEST) -m full_codegen $(FULL_CODEGEN) $(ARGS)

test-part: $(READY) ## Run one part of what test-all has beyond test (make test-part PART=2/6)
	@echo "== Running part $(PART) of the extended tests on Python $(VERSION)"
	@TEST_CODEGEN=quick TEST_PART=$(PART) $(PYTEST) -m extended $(ARGS)

test-library: $(READY) ## Run the tests of the three packages only
	@echo "== Running the packages' tests on Python $(VERSION)"
	@TEST_CODEGEN=quick $(PYTEST) -m "not extended" $(LIBRARY_TESTS) $(ARGS)

test-frameworks: ## Train inside Tunix, MaxText and Levanter, each in its own environment (ARGS=tunix: one; Python >= 3.12)
	@echo "== Each framework has a gigabyte of its own under .venv-frameworks, made the first time"
	@$$(tools/find-python $(or $(FRAMEWORKS_PYTHON),python3.12)) tools/frameworks/run.py $(ARGS)

lint: $(READY) ## Check format, style and types (ruff, pyright)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## Format the code and mend what ruff can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

wheel: $(READY) ## Build the wheel and import it from an empty directory
	@rm -rf build/wheel && mkdir -p build/wheel/empty
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target build/wheel/site build/wheel/*.whl
	@cd build/wheel/empty && PYTHONPATH=../site $(abspath $(BIN))/python -W error \
		$(abspath tools/check_wheel.py) $(abspath build/wheel/site)

plan: $(READY) ## Which optimizer fits: memory of a Llama by optimizer (make plan ARGS="--preset llama3.1_8b")
	@$(BIN)/python -m examples.llama.plan $(or $(ARGS),--preset sage_1.3b --device-gb 16)

bench-step-time: $(READY) ## Time every optimizer's step against AdamW's, paired (measured cells are kept)
	@$(BIN)/python -m benchmarks.steps.step_time $(ARGS)

bench-memory: $(READY) ## State, temporaries, bytes and compile time of every optimizer's step
	@$(BIN)/python -m benchmarks.steps.memory $(ARGS)

bench-sinkhorn: $(READY) ## Time the Sinkhorn kernel against the plain loop
	@$(BIN)/python -m benchmarks.sinkhorn $(ARGS)

bench-collectives: $(READY) ## What each update moves between devices, read from the compiled programs
	@$(BIN)/python -m benchmarks.meshes.collectives $(ARGS)

bench-lorapre: $(READY) ## Train the demo with LoRA-Pre's ranks and options (about an hour; finished runs are kept)
	@$(BIN)/python -m benchmarks.lorapre_quality $(ARGS)

bench-faithfulness: $(READY) ## Low-rank beside exact momentum over a run of the demo (about five minutes)
	@$(BIN)/python -m benchmarks.faithfulness $(ARGS)

bench-finetuning: $(READY) ## Fine-tune a small Llama with every method: exact match and costs (cells are kept)
	@$(BIN)/python -m benchmarks.finetuning $(ARGS)

bench-lowering: $(READY) ## Compile Llama-3.1-8B's fine-tuning steps from shapes alone: bytes of a device
	@$(BIN)/python -m benchmarks.meshes.lowering $(ARGS)

bench-quality: $(READY) ## Every optimizer at its tuned rate on the same tokens (hours in all; goes on where it stopped)
	@$(BIN)/python -m benchmarks.quality $(ARGS)

bench-mfu: $(READY) ## Model FLOPs utilisation, tokens/s and the optimizer's share of a step (ARGS="--profile out/profile")
	@$(BIN)/python -m benchmarks.mfu $(ARGS)

bench-accelerator: $(READY) ## On a machine with a GPU or TPU: everything that is unmeasured, in six minutes (rows are kept)
	@$(BIN)/python -m benchmarks.accelerator $(ARGS)

faults: $(READY) ## Kill, damage and starve a small run many times; the table of what survives (a few minutes)
	@$(BIN)/python -m tests.faults.kill $(ARGS)

figures: $(READY) ## Measure and draw the pictures of the explained pages (two short runs of the demo)
	@$(BIN)/python -m benchmarks.figures $(ARGS)

$(DOCS_READY): $(READY)
	@echo "== Adding what the documentation needs to $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(DOCS_READY) ## Build the documentation strictly, notebooks and link check included, into build/site (ARGS=--fast: no notebooks)
	@$(if $(filter --fast,$(ARGS)),DOCS_FAST=1) $(MKDOCS) build --strict
	@$(BIN)/python tools/docs/check_site.py build/site

docs-serve: $(DOCS_READY) ## Show the documentation at http://127.0.0.1:8000, and again after every change
	@$(MKDOCS) serve

clean: ## Remove environments, caches and outputs
	rm -rf .venv-* build out .pytest_cache .ruff_cache .hypothesis
