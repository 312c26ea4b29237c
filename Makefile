# FoloVLLM: every target sets up what it needs. On a machine with Python >= 3.11, pip and make: `make demo`, `make test`.
#   PYTHON=python3.12      another interpreter
#   PIP_ARGS="..."         passed to pip, e.g. another index for torch's CPU build (see README.md)
#   LAB_ARGS="--no-browser" passed to JupyterLab by `make notebook`
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed
MODEL ?= smollm2-135m
WORKERS ?= 2
# make test COVERAGE=1: the share of the lines that the tests run, which takes a third of the time again
COVERAGE ?=
# Where the environment says that Python writes no bytecode, each process of the tests would compile every module again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-browser test-clients test-ray bench lint docs site notebook build-notebooks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	@echo "setup: a virtual environment in $(VENV) with the pinned dependencies (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "FoloVLLM needs Python >= 3.11; found $$($(PYTHON) --version). Try: make PYTHON=python3.11 setup"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m folovllm.csrc.build || echo "setup: no C++ kernels; FoloVLLM runs without them, slower"
	@touch $(STAMP)

setup: $(STAMP)  ## virtual environment and pinned dependencies
	@echo "setup: done; activate it with: source $(BIN)/activate"

demo: $(STAMP)  ## pull the default model, answer real prompts, compare with HuggingFace
	@echo "demo: pulls the model once (93 MB), then answers prompts and compares the tokens with HuggingFace's"
	@$(BIN)/folovllm demo --model $(MODEL)

test: $(STAMP)  ## every test but the slow, GPU, Ray and browser ones; COVERAGE=1 counts the lines that run
	@echo "test: all tests but those marked slow, gpu, ray or browser, on $(WORKERS) processes"
	@$(BIN)/folovllm pull $(MODEL) --quiet
	@$(BIN)/python -m tests.m4.levels
	@$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not ray and not browser" \
		$(if $(COVERAGE),--cov --cov-report=term:skip-covered --cov-fail-under=90)

test-browser: $(STAMP)  ## the tests of the trace viewer and the chat page, in headless Chromium
	@echo "test-browser: the tests marked browser"
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ echo "test-browser needs Chromium. Try: apt-get install chromium"; exit 1; }
	@$(BIN)/python -m pytest -n $(WORKERS) -m browser

# The client libraries are no dependencies of the project, and some of them want other versions than it has.
$(CLIENTS_STAMP): tests/clients/requirements.txt tests/clients/constraints.txt
	@echo "test-clients: installs openai, litellm, langchain-openai, lm-eval and schemathesis in $(CLIENTS) (1.2 GB)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) \
		-c tests/clients/constraints.txt -r tests/clients/requirements.txt
	@touch $(CLIENTS_STAMP)

test-clients: $(STAMP) $(CLIENTS_STAMP)  ## OpenAI clients, load, faults and fuzz against real server processes
	@echo "test-clients: starts folovllm serve on free ports of 127.0.0.1 and talks to it (about 4 minutes)"
	@$(BIN)/folovllm pull $(MODEL) --quiet
	@$(CLIENTS)/bin/python -m pytest --confcutdir=tests/clients --timeout=300 tests/clients

# The extra [ray] changes none of the versions in constraints.txt, so it goes into the environment that is there.
test-ray: $(STAMP)  ## ranks, engines and data sets on a Ray that the tests start on this machine, and end
	@echo "test-ray: installs Ray (490 MB) the first time, then runs the tests marked ray"
	@$(BIN)/python -c 'import ray' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[ray]'
	@$(BIN)/python -m pytest -n 0 -m "ray and not slow" tests/m10

bench: $(STAMP)  ## throughput and latency beside HuggingFace, with a plot
	@echo "bench: every milestone beside HuggingFace on workload A; writes JSON and PNG under bench_results/"
	@$(BIN)/python scripts/compare_perf.py --model $(MODEL)

lint: $(STAMP)  ## ruff and mypy
	@echo "lint: ruff check, ruff format --check, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# build_docs.py is the last, because it also links what the others write.
docs: $(STAMP)  ## write the generated parts of the pages again
	@echo "docs: tables, lists, interview pages, links to code, outputs of the examples"
	@$(BIN)/python scripts/dev/fill_results.py
	@$(BIN)/python scripts/dev/write_milestones.py
	@$(BIN)/python scripts/dev/write_exercises_page.py
	@$(BIN)/python scripts/dev/build_interview.py
	@$(BIN)/python scripts/dev/write_front_pages.py
	@$(BIN)/python scripts/dev/build_api.py
	@$(BIN)/python scripts/dev/build_docs.py --examples

site: $(STAMP)  ## the documentation as a site with search, in site/
	@echo "site: builds site/ from docs/; open site/index.html through: $(BIN)/python -m http.server -d site"
	@$(BIN)/python -c 'import mkdocs' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@$(BIN)/python -m mkdocs build --strict --quiet

notebook: $(STAMP)  ## open the notebooks in JupyterLab
	@echo "notebook: JupyterLab with notebooks/00_one_token.ipynb; stop it with Ctrl-C"
	@$(BIN)/python -c 'import jupyterlab' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[notebooks]'
	@$(BIN)/python -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/00_one_token.ipynb $(LAB_ARGS)

build-notebooks: $(STAMP)  ## execute the notebooks again from notebooks/src
	@echo "build-notebooks: builds and executes notebooks/*.ipynb from notebooks/src"
	@$(BIN)/python scripts/build_notebooks.py

clean:  ## remove the virtual environment and caches of the tools (not the models)
	@echo "clean: removes $(VENV), $(CLIENTS) and tool caches"
	@rm -rf $(VENV) $(CLIENTS) .pytest_cache .ruff_cache .mypy_cache .coverage bench_results build site *.egg-info
