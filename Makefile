# make demo: set everything up and run the main job.   make test: set everything up and run the tests.
# Needs Python 3.10 to 3.13 and a C++20 compiler; everything else goes into .venv.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc kernels python -type f -not -name '*.pyc')

CPP_SOURCES = $(shell git ls-files "*.cpp" "*.h" "*.metal")

.PHONY: bench demo format lint test test-full macos-wheel clean

demo: $(VENV)/installed
	$(RUN) examples/demo.py

test: $(VENV)/installed
	$(RUN) -m pytest -m "not slow"

test-full: $(VENV)/installed
	$(RUN) -m pytest

# One layer beside its peers: about ten minutes on an idle machine.
bench: $(VENV)/installed
	$(RUN) -m pip install --quiet ".[bench]"
	$(RUN) -m bench.cpu.layer

# Both fail where `make format` would change something.
lint: $(VENV)/lint
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --quiet --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/lint
	$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

macos-wheel: $(VENV)/installed
	$(RUN) -m tests.cross.build_macos

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "mlx_marlin needs Python 3.10 to 3.13; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/lint: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --group lint
	@touch $@

# Not editable: what the tests see is what a user installs.
$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(RUN) -m pip install --quiet ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist
