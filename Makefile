# Everything a newcomer runs. Needs Python 3.11 or newer with venv; `make test` and `make demo` set up the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST_TESTS := tests/unit tests/property tests/contract tests/test_house_rules.py
# Files side by side on the cores of the machine.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test check soak bench clean install system lint

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## train, kill, resume: what the library does, in a minute
	$(BIN)/python examples/demo.py

test: system lint  ## everything but soak: linters and types, then all tests
	$(PYTEST) -m "not soak" tests

check: lint  ## linters, types, import rules and the fast tests; under three minutes
	$(PYTEST) -m "not soak" $(FAST_TESTS)

soak: system $(STAMP)  ## the tests that take minutes to hours
	$(BIN)/python -m pytest -m soak tests

bench: $(STAMP)  ## saves, stalls and restores beside other libraries', with tables and plots; under 15 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,bench]'
	$(BIN)/python -m bench.compare --gib 2 --runs 5

clean:  ## remove the virtual environment, caches and build outputs
	rm -rf $(VENV) build dist demo-output .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(STAMP)  ## set up .venv

# The environment is made anew when dependencies change: an upgrade in place would keep what is no longer declared.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastckpt needs Python 3.11 or newer; try make PYTHON=python3.12")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests of power cuts and dead storage mount file systems of their own, and strace kills at system calls. Without these
# tools, or without root, such tests are skipped.
system:
	@missing=""; \
	for tool in mkfs.ext4 mkfs.xfs losetup mount strace fusermount3; do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v $$tool >/dev/null || missing="$$missing $$tool"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing packages for:$$missing"; \
		export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends e2fsprogs xfsprogs mount util-linux strace fuse3; } >/dev/null || \
		echo "could not install them; tests that need them do not run"; \
	else \
		echo "missing:$$missing (packages e2fsprogs xfsprogs mount util-linux strace fuse3); tests that need them are skipped"; \
	fi
