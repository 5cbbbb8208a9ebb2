# Everything runs in .venv, which the first target makes. PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# pip shows what it downloads and installs; warnings about places that are not there are not for readers of this.
INSTALL := $(BIN)/pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e

.PHONY: demo scale test test-slow coverage test-networks networks interop test-oldest docs lint bench clean

# What the command line needs, without tools for development.
$(VENV)/.runs: pyproject.toml constraints.txt
	@echo "Setting up $(VENV); the first time this takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[cli]'
	@touch $@

$(VENV)/.installed: $(VENV)/.runs
	@echo "Adding the tools for development."
	$(INSTALL) '.[dev]'
	@touch $@

demo: $(VENV)/.runs  ## train, fit and compare on data that ships with scikit-learn
	$(BIN)/stochbn demo

# On every processor, but at most 4; the tests of a file, which share networks, stay in one process.
SPREAD := -n logical --maxprocesses 4 --dist loadfile

test: $(VENV)/.installed  ## run the tests
	$(BIN)/pytest $(SPREAD)

test-slow: $(VENV)/.installed  ## run the tests that only widen what others cover
	$(BIN)/pytest $(SPREAD) -m long

coverage: $(VENV)/.installed  ## the same, and which lines and branches of src/ they run, in build/coverage/html
	$(BIN)/pytest $(SPREAD) --cov --cov-report=term --cov-report=html
	@echo "Open build/coverage/html/index.html"

# pytorchcv asks for torchvision, which few of its modules need and which does not import beside every torch.
$(VENV)/.networks: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[networks]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps pytorchcv
	@touch $@

test-networks: $(VENV)/.networks  ## try networks of Transformers, pytorchcv, MONAI, PyTorch Geometric and TabNet
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m networks tests/interop

networks: $(VENV)/.networks  ## the same, and docs/networks.md of what came out
	HF_HUB_OFFLINE=1 STOCHBN_NETWORKS_OUT=results/networks/main.json $(BIN)/pytest -m networks tests/interop
	$(BIN)/python benchmarks/networks.py

# torchvision needs another torch, of some gigabytes: an environment of its own.
OTHER := .venv-interop

$(OTHER)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm \
		segmentation-models-pytorch ultralytics-opencv-headless pytest pytest-timeout hypothesis
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check -e '.[cli]'
	@touch $@

interop: $(OTHER)/.installed $(VENV)/.installed  ## networks of torchvision, timm, Ultralytics and segmentation-models-pytorch
	HF_HUB_OFFLINE=1 STOCHBN_NETWORKS_OUT=results/networks/torchvision.json $(OTHER)/bin/pytest -m networks tests/interop
	$(BIN)/python benchmarks/networks.py

# The oldest versions that pyproject.toml allows, found by uv; of torch the one of constraints.txt, since older ones are
# gigabytes. They are constraints and not a list to install: torch's builds for processors need none of the CUDA packages.
OLDEST := .venv-oldest

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	grep '^torch==' constraints.txt > $(OLDEST)/torch.txt
	$(OLDEST)/bin/uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct \
		$(foreach extra,metrics cli export hub dev,--extra $(extra)) --constraint $(OLDEST)/torch.txt \
		--output-file $(OLDEST)/versions.txt pyproject.toml
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/versions.txt -e '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed  ## run the tests under the oldest versions that pyproject.toml allows, but for torch
	$(OLDEST)/bin/pytest $(SPREAD)

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## the site, in build/site; its pictures are drawn anew
	$(BIN)/sphinx-build -q -a -W --keep-going -c docs/site . build/site
	@echo "Open build/site/index.html"

$(VENV)/.scale: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[scale]'
	@touch $@

scale: $(VENV)/.scale  ## install Ray, FastAPI and a local object store, for the tests of many machines (400 MB)

lint: $(VENV)/.installed  ## style, spelling and types
	$(BIN)/codespell src tests docs benchmarks examples *.md results/*.md
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## what uncertainty costs, in forward passes of the plain network (needs STOCHBN_DATA)
	$(BIN)/stochbn bench results/trained/lenet5/plain-0/network.safetensors --batch 100 --batch 1000 --out results/lenet5-cost
	$(BIN)/stochbn bench results/trained/vgg11/plain-0/network.safetensors --out results/vgg11-cost
	$(BIN)/stochbn bench results/trained/resnet18/plain-0/network.safetensors --batch 32 --out results/resnet18-cost

clean:  ## remove the environment
	rm -rf $(VENV) $(OTHER) $(OLDEST) build docs/gallery
