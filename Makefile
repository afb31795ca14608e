# On a machine with only Python 3.11+ and make: `make run` trains and compares, `make test` tests; both install first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Data files live outside the project; CI finds them beside it.
export JAXEFF_DATA ?= $(wildcard $(abspath ../shared/data))
RESULTS := launch/bench/results

.PHONY: run test quick lint flower bench results notebooks gpu clean

run: $(STAMP)
	$(BIN)/python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist=worksteal

quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "not slow and not data and not multidevice and not notebooks"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Federation between processes, in an environment of its own: flwr and the tested versions of others exclude each other.
flower:
	@test -x $(VENV)-flower/bin/python || $(PYTHON) -m venv $(VENV)-flower
	$(VENV)-flower/bin/python -m pip install --quiet -e ".[test,flower]"
	$(VENV)-flower/bin/python -m pytest tests/federated/test_flower.py tests/launch/test_federate_network.py

# The peers are not in the test environment: CPU builds of torch come from wherever pip is told to look.
bench: $(STAMP)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m launch.bench.ops --json $(RESULTS)/ops.json
	$(BIN)/python -m launch.bench.quadratic --json $(RESULTS)/quadratic.json
	$(BIN)/python -m launch.bench.dynamic --json $(RESULTS)/dynamic.json
	# FedJAX does not install beside a jax of today; without it a loop of jitted steps is the peer (see the module).
	$(BIN)/python -m launch.bench.federated --json $(RESULTS)/federated.json
	# The device's own ceiling needs fio or a C compiler; RocksDB (rocksdict) and FBGEMM are peers where they are installed.
	$(BIN)/python -m launch.bench.sdm --json $(RESULTS)/sdm.json

results: $(STAMP)
	$(BIN)/python -m launch.bench.results

notebooks: $(STAMP)
	$(BIN)/python -m launch.address
	$(BIN)/python -m launch.notebooks
	$(BIN)/python -m pytest tests/notebooks

# No installation: the Python on the PATH, and nothing that it lacks.
gpu:
	@# torch shares the GPU, so JAX must not take most of it; the benchmarks run even where a test fails.
	@export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false; status=0; \
	$(PYTHON) -m pytest -m gpu -q -p no:cacheprovider $(wildcard tests/*/test_gpu.py) || status=1; \
	for room in ops quadratic dynamic federated sdm; do \
	  $(PYTHON) -m launch.bench.$$room --device gpu --json $(RESULTS)/$${room}_gpu.json || status=1; \
	done; exit $$status

clean:
	rm -rf $(VENV) $(VENV)-flower build dist .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jaxeff needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@# Removed when it fails half way (Debian without python3-venv), so that the next try starts clean.
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || uv venv --seed --python $(PYTHON) $(VENV) || { rm -rf $(VENV); exit 1; }
	@# uv installs in seconds what takes pip a minute; where it cannot be had, pip does it.
	@$(BIN)/python -m pip install --quiet uv 2>/dev/null || true
	@if $(BIN)/python -m uv --version >/dev/null 2>&1 && UV_PYTHON_DOWNLOADS=never $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[test]"; \
	then echo "installed with uv"; \
	else $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]" && echo "installed with pip"; fi
	@touch $(STAMP)
