# make quickstart     train a tiny model on the bundled sample, chat with it, print its score
# make speedrun       the real thing: download, pretrain, SFT, scores, report, chat (SIZE=, STAGES=, LAUNCHER=, FLAGS=)
# make test           lint and the quick tests
# make test-all       every test, the long matrix too
# make test-interop   our GGUF files in llama.cpp (builds it from source, about ten minutes once)
# make lint           ruff, and mypy on model/, dataset/, trainer/
# make bench          speed of training and of the data path, each next to a peer
# make clean          remove caches and what tests leave behind; weights, logs and data stay
# make erase          delete out/ (weights, logs, resume states) and .venv/, after showing them and asking
#
# The virtual environment is made on first use. PYTHON names the interpreter that makes it.

WINDOWS := $(filter Windows_NT,$(OS))
PYTHON ?= $(if $(WINDOWS),python,python3)
VENV := .venv
BIN := $(VENV)/$(if $(WINDOWS),Scripts,bin)
PIP := $(BIN)/python -m pip install --disable-pip-version-check
OUT ?= out/quickstart

.DEFAULT_GOAL := help
.PHONY: help quickstart speedrun test test-all test-interop lint bench clean erase

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MiniMind needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages; torch alone is hundreds of MB, with CUDA several GB."
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-cloud.txt
	$(PIP) -r requirements-dev.txt
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python scripts/quickstart.py --out_dir $(OUT)

speedrun: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/speedrun.py $(if $(SIZE),--size $(SIZE)) \
		$(if $(STAGES),--stages $(STAGES)) $(if $(LAUNCHER),--launcher "$(LAUNCHER)") $(FLAGS)

test test-all: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not full and not interop"

test-all: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-interop: $(VENV)/.installed-dev
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) -r requirements-interop.txt
	$(BIN)/python -m pytest -q -m interop

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/data_pipeline.py
	$(BIN)/python benchmarks/train_throughput.py

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

erase:
	@echo "This deletes all weights, logs and resume states in out/, and the virtual environment:"
	@du -sh out $(VENV) 2>/dev/null || true
	@printf 'Type yes to delete: '; read answer; \
	if [ "$$answer" = yes ]; then rm -rf out $(VENV); else echo "Nothing was deleted."; fi
