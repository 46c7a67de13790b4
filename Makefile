# make quickstart   train a tiny model on the bundled sample, chat with it, print its score
# make test         lint and the quick tests        make test-all   every test
# make test-interop   our GGUF files in llama.cpp (builds it from source, about ten minutes once)
# make bench        speed of training and of the data path, each beside a peer
#
# The virtual environment is made on first use. PYTHON names the interpreter that makes it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/quickstart

.PHONY: quickstart test test-all test-interop lint bench clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MiniMind needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python scripts/quickstart.py --out_dir $(OUT)

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -q -m "not full and not interop"

test-all: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -q

test-interop: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-interop.txt
	$(BIN)/python -m pytest -q -m interop

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/data_pipeline.py
	$(BIN)/python benchmarks/train_throughput.py

clean:
	rm -rf out .pytest_cache .ruff_cache
