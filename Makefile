# Every target sets up what it needs in .venv; nothing has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
PORT ?=
EVENTS ?=
DATA ?=
JSON ?=
# Tests at a time.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-cuda test-oldest check lint types proto clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: .venv/.installed  ## the whole loop on a simulated audience; DATA=ratings.csv EVENTS=n JSON=1
	$(BIN)/recsys demo $(if $(DATA),--data '$(DATA)') $(if $(EVENTS),--events $(EVENTS)) $(if $(JSON),--json)

# Compiled beforehand, once: else the first tests wait for it, and each test process compiles for itself.
test: .venv/.installed  ## every test
	$(BIN)/recsys compile
	$(BIN)/python -m pytest -n $(JOBS)

# uv finds them; pip cannot.
test-oldest:  ## every test with the oldest releases that pyproject.toml allows, in .venv-oldest
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-oldest/bin/recsys compile
	.venv-oldest/bin/python -m pytest -n $(JOBS)

test-cuda: .venv/.installed  ## the learner's and scorer's tests on a GPU
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || \
		echo "*** torch finds NO CUDA DEVICE here: every test below is skipped, NOTHING is tested on a GPU ***" >&2
	RECSYS_TEST_CUDA=1 $(BIN)/python -m pytest -m cuda

lint: .venv/.installed  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Tests and benchmarks: what they call is there and takes what it is given; they need not be strict.
LOOSE := $(addprefix --disable-error-code=,arg-type func-returns-value index misc no-untyped-call operator union-attr) \
	--disable-error-code=no-any-return --disable-error-code=unused-ignore --disable-error-code=comparison-overlap

types: .venv/.installed  ## mypy: strict, of tests and benchmarks less so
	$(BIN)/mypy
	$(BIN)/mypy $(LOOSE) tests
	$(BIN)/mypy $(LOOSE) benchmarks

check: lint types test  ## what CI runs

proto: .venv/.installed  ## regenerate the stubs from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. $$(find proto -name '*.proto' | sort)
	rm -f recsys/store/v1/*_pb2_grpc.py

clean:  ## remove the environment and caches
	rm -rf .venv .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
