# Everything runs in .venv, which the first target makes. PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo scale test test-long lint bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV); the first time this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## train, fit and compare on data that ships with scikit-learn
	$(BIN)/stochbn demo

test: $(VENV)/.installed  ## run the tests
	$(BIN)/pytest

test-long: $(VENV)/.installed  ## run the tests that only widen what others cover
	$(BIN)/pytest -m long

$(VENV)/.scale: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[scale]'
	@touch $@

scale: $(VENV)/.scale  ## install Ray, FastAPI and a local object store, for the tests of many machines (400 MB)

lint: $(VENV)/.installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Networks to measure; the first run trains them, for about half an hour.
RUNS := runs/bench
REPRODUCE := $(BIN)/stochbn reproduce --preset reduced --members 1 --dropout 0 --jobs 1 --held-out 0.1

bench: $(VENV)/.installed  ## what uncertainty costs, in forward passes of the plain network
	$(REPRODUCE) --out $(RUNS)/lenet5 lenet5
	$(REPRODUCE) --precision bf16-mixed --out $(RUNS)/vgg11 vgg11
	$(REPRODUCE) --precision bf16-mixed --out $(RUNS)/resnet18 resnet18
	$(BIN)/stochbn bench $(RUNS)/lenet5/plain-0/network.safetensors --batch 100 --batch 1000 --out results/lenet5-cost
	$(BIN)/stochbn bench $(RUNS)/vgg11/plain-0/network.safetensors --out results/vgg11-cost
	$(BIN)/stochbn bench $(RUNS)/resnet18/plain-0/network.safetensors --batch 32 --out results/resnet18-cost

clean:  ## remove the environment
	rm -rf $(VENV)
