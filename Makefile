# `make` alone lists the targets; PYTHON is the interpreter that the tools and tests run under
VENV := .venv
PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
PYTEST_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup check format lint types imports test fuzz pictures bench-conversation bench-peer bench-convert
.PHONY: bench-ui bench-turns bench-gpu

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with qchat, its tests' and its developers' tools, at the pinned versions
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable . --group dev

check: format lint types test ## all that must pass before a change lands; `test` includes the import rules

format: ## is the code formatted? (`ruff format` does it)
	$(PYTHON) -m ruff format --check

lint: ## common mistakes and style
	$(PYTHON) -m ruff check

types: ## type errors, in the code and in the tests
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

imports: ## who may import whom, and the README's map of modules
	$(PYTHON) -m pytest tests/test_imports.py

test: ## every test
	$(PYTHON) -m pytest $(PYTEST_FLAGS)

fuzz: ## 320 random conversations, each step compared with a cold run; 200 random troubles of a download
	TESTS_SCRIPTS=80 $(PYTHON) -m pytest tests/core/conversation/test_cached_equals_cold.py -k script
	TESTS_DOWNLOADS=200 $(PYTHON) -m pytest tests/core/hub/test_download_safety.py

pictures: ## the README's pictures, made by the app itself
	PYTHONPATH=.dev:. $(PYTHON) tests/make_pictures.py

bench-ui: ## what the screens cost, beside their budgets
	$(PYTHON) tests/bench_ui.py
	PYTHONPATH=.dev:. $(PYTHON) tests/bench_worker.py

bench-conversation: ## what each turn reads, cached and not; reopening; memory
	$(PYTHON) tests/bench_conversation.py

bench-turns: ## memory over 200 turns, beside mlx-lm's chat (needs the `peers` group)
	$(PYTHON) tests/peers/bench_turns.py

bench-peer: ## tokens/s here against mlx-lm's on one model (needs the `peers` group)
	$(PYTHON) tests/peers/bench_peer.py

bench-convert: ## seconds, MB/s and memory of converting 8 GB, beside mlx_lm.convert (needs `peers`)
	$(PYTHON) tests/peers/bench_convert.py

bench-gpu: ## on an NVIDIA GPU: every kernel against float32, then the speed of all variants of CONFIGS
	MLX_ENABLE_TF32=0 PYTHONPATH=.dev $(PYTHON) tests/gpu/check_kernels.py
	PYTHONPATH=.dev $(PYTHON) tests/gpu/race.py $(CONFIGS)
