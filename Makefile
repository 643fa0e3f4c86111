# Every target sets up what it needs in .venv; `make demo PYTHON=python3.12` chooses another Python.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-fast lint bench bench-gpu docs clean

.venv/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready  ## six small domains on one network, two to four minutes on two CPU cores
	$(BIN)/python train_sequential.py --overwrite

test: .venv/ready  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-fast: .venv/ready  ## laws, formulas and files
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready  ## ratios against plain networks, measured side by side; peak memory of joint training; what skipping saves
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/skipping.py

bench-gpu: .venv/ready  ## speed and memory on a CUDA device, written to docs/gpu.md
	$(BIN)/pip install -q 'peft>=0.13'
	$(BIN)/python benchmarks/gpu.py

docs: .venv/ready  ## the pages and the Python reference as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache
