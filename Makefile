# Every verb first makes the environment it needs: .venv, Python 3.10, exactly what the lock file says.
# The stamps .venv/.core and .venv/.full are older than a lock file that has changed, so that it is installed again.

.NOTPARALLEL:
.PHONY: help setup demo test test-pipeline check bench gpu-check kubeflow lock

PYTHON := .venv/bin/python
# A version manager's shim may be there and fail, so uv counts only if it runs.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
OWN_UV := $(filter .uv/%,$(UV))
COMPILE := --python-version 3.10 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	--no-annotate --no-header --no-emit-index-url --quiet

help:
	@echo "make demo    train an undefended and a hardened model on digits, and compare them (installs the core)"
	@echo "make setup   install everything: core, pipelines, serving, benchmarks, tests"
	@echo "make test    run the tests, with coverage"
	@echo "make test-pipeline  run the TFX pipeline on digits: pushed, blocked, cached, stopped by broken examples"
	@echo "make check   check format, lint, types and import rules"
	@echo "make bench   time training steps against their floor and against other libraries"
	@echo "make gpu-check  train, compile and export for ten minutes on the accelerator of this machine, and report"
	@echo "make kubeflow  make the environment .venv-kubeflow, in which pipelines.kubeflow_runner compiles"
	@echo "make lock    write both lock files anew from setup.cfg"

setup: .venv/.full

# The full environment holds the core in the same versions.
demo: $(or $(wildcard .venv/.full),.venv/.core)
	$(PYTHON) -m kerasdefense.demo

test: .venv/.full
	$(PYTHON) -m pytest --cov --cov-report=term --numprocesses=logical --maxprocesses=4 --dist=loadfile

test-pipeline: .venv/.full
	$(PYTHON) -m pytest tests/pipelines -m pipeline -rP

check: .venv/.full
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

bench: .venv/.full
	$(PYTHON) -m benchmarks

gpu-check: .venv/.full
	$(PYTHON) -m benchmarks.accelerator

kubeflow: | $(OWN_UV)
	$(UV) venv --quiet --no-project --python 3.10 .venv-kubeflow
	$(UV) pip install --quiet --python .venv-kubeflow/bin/python --build-constraints requirements.lock '.[kubeflow]'

lock: | $(OWN_UV)
	$(UV) pip compile $(COMPILE) --extra pipelines --extra serving --extra bench --extra test \
		setup.cfg -o requirements.lock
	$(UV) pip compile $(COMPILE) --constraints requirements.lock setup.cfg -o requirements-core.lock

.venv/.core: requirements-core.lock | $(OWN_UV)
	@echo "Installing the core (TensorFlow and what trains, attacks and evaluates) into .venv:"
	@echo "downloads up to 0.7 GB, less what uv has cached; takes 2.2 GB on disk."
	$(install)

.venv/.full: requirements.lock | $(OWN_UV)
	@echo "Installing everything (core, TFX, serving, benchmarks, tests) into .venv:"
	@echo "downloads up to 0.9 GB, less what uv has cached; takes 2.9 GB on disk."
	$(install)

# Install the first prerequisite, a lock file, and this package on top of it.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null \
	|| { rm -rf .venv && $(UV) venv --quiet --no-project --python 3.10 .venv; } \
	|| { echo "No Python 3.10 here and none could be downloaded: install it (Debian, Ubuntu: python3.10)." >&2; exit 1; }
@rm -f .venv/.core .venv/.full
@$(UV) pip sync --python $(PYTHON) --require-hashes --build-constraints $< $< \
	|| { echo "The installation failed, see above. Where a compiler is missing: install g++ and Python's" \
	"headers (Debian, Ubuntu: g++ python3.10-dev), for the one package that comes as source." >&2; exit 1; }
@$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
@touch $@
endef

.uv/bin/uv:
	@echo "No working uv on PATH: installing it into .uv (downloads 20 MB, takes 60 MB on disk)."
	@for python in python3.10 python3.11 python3.12 python3.13 python3; do \
		$$python -m venv --clear .uv >/dev/null 2>&1 && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv && exit; \
	done; rm -rf .uv; \
	echo "No uv, and no Python that could install it: install uv, or Python 3.10 with venv" \
	"(Debian, Ubuntu: python3.10-venv)." >&2; exit 1
