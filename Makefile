# `make` alone lists the targets. PYTHON is the interpreter that runs the tools and the tests.
VENV := .venv
PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
PYTEST_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup check format lint types imports test test-all fuzz pictures tables bench-conversation bench-peer
.PHONY: bench-convert bench-quality bench-ui bench-start bench-turns bench-drafts bench-serve bench-gpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv with qchat, the test tools and the developer tools, all at pinned versions
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable . --group dev

check: format lint types test ## run everything that must pass before a change lands

format: ## check the formatting (`ruff format` fixes it)
	$(PYTHON) -m ruff format --check

lint: ## check for common mistakes and style
	$(PYTHON) -m ruff check

types: ## check the types of the code and of the tests
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

imports: ## check the import rules and the maps of modules in the READMEs (part of test)
	$(PYTHON) -m pytest tests/test_imports.py

test: ## run the fast tests, on all cores
	$(PYTHON) -m pytest -m 'not slow' --numprocesses=auto --dist=worksteal $(PYTEST_FLAGS)

test-all: ## run every test, on all cores
	$(PYTHON) -m pytest --numprocesses=auto --dist=worksteal $(PYTEST_FLAGS)

fuzz: ## run random conversations, drafts on 100 prompts, downloads with faults, random schemas, and mutated files and lines
	TESTS_SCRIPTS=80 $(PYTHON) -m pytest tests/core/conversation/test_cached_equals_cold.py -k script
	TESTS_SCRIPTS=200 $(PYTHON) -m pytest tests/core/prompt_cache/test_live_state.py -k cold_run
	TESTS_PROMPTS=100 $(PYTHON) -m pytest tests/core/generation/test_speculate.py -k greedy_replies
	TESTS_DOWNLOADS=200 $(PYTHON) -m pytest tests/core/hub/test_download_safety.py
	TESTS_SCHEMAS=200 $(PYTHON) -m pytest tests/core/generation/test_constraint.py -k satisfy
	TESTS_FUZZ=1 $(PYTHON) -m pytest tests/test_fuzz.py
	TESTS_PRESSURE=1 $(PYTHON) -m pytest tests/core/worker/test_memory_guard.py -k "gigabyte or neighbour"
	TESTS_REQUESTS=10000 $(PYTHON) -m pytest tests/tui/serve/test_server.py -k malformed

pictures: ## take the READMEs' pictures with the app itself; all states of the app into FOLDER, if that is given
	PYTHONPATH=.dev:. $(PYTHON) tests/make_pictures.py $(FOLDER)

tables: ## write the tables of tui/README.md from the code
	PYTHONPATH=.dev:. $(PYTHON) tests/make_tables.py

bench-ui: ## measure what the screens cost, beside their budgets
	$(PYTHON) tests/bench_ui.py
	PYTHONPATH=.dev:. $(PYTHON) tests/bench_worker.py

bench-start: ## measure seconds to the first token and the first paint, on a fresh home and on a warm one
	$(PYTHON) tests/bench_start.py

bench-conversation: ## measure what each turn reads, with and without snapshots, and what reopening costs
	$(PYTHON) tests/bench_conversation.py

bench-turns: ## measure memory over 200 turns, beside mlx-lm's chat (needs the `peers` group)
	$(PYTHON) tests/peers/bench_turns.py

bench-peer: ## race mlx-lm and llama.cpp on one model, in tokens/s (needs the `peers` group)
	$(PYTHON) tests/peers/bench_peer.py

bench-convert: ## race mlx_lm.convert on 8 GB: seconds, MB/s, memory (needs the `peers` group)
	$(PYTHON) tests/peers/bench_convert.py

bench-quality: ## measure KL against size: ours, mlx-lm's, and llama.cpp's with LLAMA_CPP=FOLDER (needs the `peers` group)
	$(PYTHON) tests/peers/bench_quality.py $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP))

bench-pictures: ## measure seconds and memory of hostile and of the largest picture files
	PYTHONPATH=.dev:. $(PYTHON) tests/bench_pictures.py

bench-memory: ## measure the memory of --q-recipe best with --rounding gptq at the widths of 27B and 35B-A3B, killed and resumed
	PYTHONPATH=.dev:. $(PYTHON) tests/bench_memory.py

bench-drafts: ## measure tokens/s with and without drafts where a reply rewrites a file of its prompt
	PYTHONPATH=.dev:. $(PYTHON) tests/bench_drafts.py

bench-serve: ## measure the server's first token and its cost per token, beside mlx_lm.server
	PYTHONPATH=.dev:. $(PYTHON) tests/bench_serve.py

bench-gpu: ## on an NVIDIA GPU, compare every kernel with float32, then time all variants of CONFIGS
	MLX_ENABLE_TF32=0 PYTHONPATH=.dev $(PYTHON) tests/gpu/check_kernels.py
	MLX_ENABLE_TF32=0 PYTHONPATH=.dev $(PYTHON) tests/gpu/delta_forms.py
	PYTHONPATH=.dev $(PYTHON) tests/gpu/race.py $(CONFIGS)
