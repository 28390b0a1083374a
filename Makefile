# Two commands: `make quickstart` trains the small example, `make test` checks everything.
# `make docs` builds the pages alone. All need Python 3.11 or newer and make; all else goes into .venv.
#
#   PYTHON=python3.12                 the interpreter that .venv is made from
#   TORCH_INDEX=URL                   a further package index for torch, such as one of CPU-only builds
#   TEST_WORKERS=2                    processes that the tests are shared out to, file by file

PYTHON ?= python3
TORCH_INDEX ?=
TEST_WORKERS ?= 2

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# A link that leads nowhere ends it.
MAKE_DOCS := $(BIN)/zensical build --strict --clean

.PHONY: quickstart test docs
.DELETE_ON_ERROR:

quickstart: .venv/installed-quickstart
	$(BIN)/rexrag train

test: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE_DOCS)
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

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
	$(INSTALL) --editable '.[dev,docs,quickstart]'
	touch .venv/installed-quickstart $@
