# make demo: the main job in one command, with a report.   make test: the tests.   make check: lint, format, types.
# make oracles: what some tests compare with, and what must not bring its dependencies along.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ifeq ($(wildcard /dev/nvidiactl),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: demo test check install oracles weights clean

demo: install
	$(BIN)/python -m unitok demo --out out/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

weights: install
	$(BIN)/python -m unitok.weights --out out/weights

oracles: install  # DALL-E declares torchvision, which breaks transformers beside a CPU torch
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps DALL-E==0.1
	$(BIN)/python -m pip install --disable-pip-version-check --quiet attrs requests

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf out build dist *.egg-info
