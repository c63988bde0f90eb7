# make demo: set everything up and run the main job.   make test: set everything up and run the tests.
# make dev: install the clone itself, for development; the other targets then use that. See CONTRIBUTING.md.
# Needs Python 3.10 to 3.13 and a C++20 compiler; everything else goes into .venv.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
# A process per core, at most four: each comes to hold 1.3 GB. The tests of a file stay together, as they share what they
# compile and convert.
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
COMPILED := pyproject.toml CMakeLists.txt $(shell find cmake csrc kernels -type f)
SOURCES := $(COMPILED) $(shell find python -type f -not -name '*.pyc')

CPP_SOURCES = $(shell git ls-files "*.cpp" "*.h" "*.metal")

# The build tree of make dev stays, with paths that stay: only what changed is compiled again.
EDITABLE := --no-build-isolation --config-settings=build-dir=build/dev --editable

# Without make dev: what the tests see is what a user installs.
INSTALLED := $(if $(wildcard $(VENV)/editable),$(VENV)/editable,$(VENV)/installed)

.PHONY: bench clean demo dev docs first-run format lint macos-wheel sanitize test test-full

demo: $(INSTALLED)
	$(RUN) examples/demo.py

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-full: $(INSTALLED)
	$(PYTEST)

# The C++ parts without MLX under the address, undefined-behaviour and thread sanitizers; a part of test-full.
sanitize: $(INSTALLED)
	$(RUN) -m pytest tests/sanitize

# One layer beside its peers: about ten minutes on an idle machine.
bench: $(VENV)/bench
	$(RUN) -m bench.cpu.layer

# On a Mac: everything that a first run shows, in one JSON file.
first-run: $(INSTALLED)
	$(RUN) -m bench.first_run.first_run

# The API reference: static pages, build/docs/index.html.
docs: $(INSTALLED)
	$(RUN) docs/reference.py build/docs

dev: $(VENV)/editable $(VENV)/lint

# All but mypy fail where `make format` would change something. mypy reads the types of what the package imports.
lint: $(VENV)/lint build/stubs/mlx_marlin/_ext.pyi
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --quiet --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(VENV)/bin/mypy --no-error-summary

# The build writes the extension's types beside the extension, not into the clone.
build/stubs/mlx_marlin/_ext.pyi: $(INSTALLED)
	@mkdir -p $(@D)
	@cp $(VENV)/lib/python3*/site-packages/mlx_marlin/_ext.pyi $@

format: $(VENV)/lint
	$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

macos-wheel: $(INSTALLED)
	$(RUN) -m tests.cross.build_macos

# Shows which file is compiled; where it fails, the end of the whole output.
define install
	@echo "Installing. Compiling takes four minutes of processor time the first time; output: build/install.log"
	@mkdir -p build
	@{ $(RUN) -m pip install --verbose $(1) 2>&1; echo $$? > build/install.status; } | tee build/install.log | \
	{ grep --line-buffered -E '^ *\[[0-9]+/[0-9]+\]' || true; }
	@test "$$(cat build/install.status)" = 0 || { tail -n 40 build/install.log; exit 1; }
endef

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "mlx_marlin needs Python 3.10 to 3.13; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/lint: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --group lint
	@touch $@

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(call install,".[test]")
	@touch $@

$(VENV)/bench: pyproject.toml | $(INSTALLED)
	$(call install,$(if $(wildcard $(VENV)/editable),$(EDITABLE)) ".[bench]")
	@touch $@

# What pip would install for the time of a build, so that later builds find it where the first one did.
$(VENV)/build-requirements: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet scikit-build-core
	$(RUN) -m scikit_build_core.build requires --mode editable | $(RUN) -c \
	'import json, sys; print(*json.load(sys.stdin), sep="\n")' > $@.txt
	$(RUN) -m pip install --quiet --requirement $@.txt
	@touch $@

# Python sources are read where they are; only the rest needs a build.
$(VENV)/editable: $(VENV)/build-requirements $(COMPILED)
	$(call install,$(EDITABLE) ".[test]")
	@touch $@

clean:
	rm -rf $(VENV) build dist
