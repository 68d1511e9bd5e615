# make demo | test | check | bench | clean   (interface of the project; see README.md)
PYTHON ?= python3
BIN := .venv/bin

.venv/.installed: pyproject.toml constraints.txt src/atmc/deploy/engine/native/kernel.cpp src/atmc/deploy/engine/native/lanes.inc
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "atmc needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo test check bench clean
demo: .venv/.installed
	$(BIN)/atmc compress --config configs/digits.toml --out runs/demo --overwrite

test: .venv/.installed check

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile  # two processes of one thread use two cores best

bench: .venv/.installed
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/projections.py

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
