PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
TEXT := $(CACHE)/wikipedia.jsonl
MODEL := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
MINUTES ?= 6

export POWER_RETENTION_CACHE := $(CURDIR)/$(CACHE)

.PHONY: demo test lint format bench clean

## demo: convert, retrain, evaluate and generate with a real 135M model; about 13 minutes on 2 cores
demo: demo/retrained/config.json
	$(BIN)/power-retention evaluate demo/retrained --text $(TEXT)
	$(BIN)/power-retention generate demo/retrained "The old lighthouse on the coast" --max-new-tokens 60

demo/retrained/config.json: demo/converted/config.json
	$(BIN)/power-retention retrain demo/converted demo/retrained --text $(TEXT) --minutes $(MINUTES) --resume

demo/converted/config.json: $(VENV)/.installed
	$(BIN)/python scripts/fetch_demo_assets.py --cache $(CACHE)
	$(BIN)/power-retention convert $(MODEL) demo/converted --text $(TEXT)

## test: every test, on real small models
test: $(VENV)/.installed
	$(BIN)/python -m pytest

## lint: style and types
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: let ruff rewrite what it can
format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## bench: CPU figures against the same model in transformers; 15 minutes on an otherwise idle machine
bench: demo/retrained/config.json
	$(BIN)/python -c "from power_retention.conversion.source import open_source as o; s = o('$(MODEL)'); s.model.save_pretrained('demo/teacher'); s.tokenizer.save_pretrained('demo/teacher')"
	$(BIN)/python benchmarks/cpu.py demo/teacher demo/retrained

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache
