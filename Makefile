# `make run` does the main job, `make test` checks everything; both set up what they need.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
JOBS ?= 2
FAULTS ?= 2000
SEED ?= 0
PARTS := $(BIN)/python .ci/parts.py
QUIET := OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 HF_HUB_OFFLINE=1

# What leaderboards/tiny.toml and leaderboards/short.toml report.
FULL := --methods gpo,diffusion-nft,awm,diffusion-dpo,dgpo,flow-grpo,grpo-guard,mix-grpo,rwr --task ocr,counting \
    --model tiny --seeds 3 --budget nfe=30000 --set evaluation.eval_points=4
SHORT := --methods gpo,diffusion-dpo --no-baselines --task ocr --model tiny --seeds 2 --budget nfe=16000 \
    --set optim.lr=3e-4 --set optim.warmup=0 --set optim.ema=0 \
    --set evaluation.split=validation --set evaluation.validation_images=2 --set evaluation.eval_points=1
REGRESS := $(QUIET) $(BIN)/gpobench regress --run short --fresh --jobs $(JOBS) --allow-unsure --out runs/short

# Tests whose numbers depend on how the processor rounds; tests/conftest.py marks them, and of them a sample of a minute.
NUMERIC := $(BIN)/pytest -q -m 'numeric and not slow'
TWO_THREADS := OMP_NUM_THREADS=2 OMP_THREAD_LIMIT=2 HF_HUB_OFFLINE=1

.PHONY: run test regress portable slow faults calibration bench board clean help

run: .venv/core.stamp  ## train GPO on OCR with the embedded model under a budget, and evaluate it (more flags: ARGS="--seed 1")
	$(BIN)/gpobench run --method gpo --task ocr --model tiny $(ARGS)

test: .venv/dev.stamp  ## the test suite, the regression gate, the linters and the type checks: all run, then which failed
	@$(PARTS) \
	    "pytest: $(QUIET) $(BIN)/pytest -n 2 -rs" \
	    "perturbed sample: $(QUIET) $(BIN)/pytest -q -n 2 -m portable_sample --perturb" \
	    "regress: $(REGRESS)" \
	    "ruff check: $(BIN)/ruff check ." \
	    "ruff format: $(BIN)/ruff format --check ." \
	    "pyright: $(BIN)/pyright" \
	    "lint-imports: $(BIN)/lint-imports"

regress: .venv/core.stamp  ## train again what leaderboards/short.toml reports, and compare: minutes
	$(REGRESS)

portable: .venv/dev.stamp  ## the numeric tests as other processors compute them: tens of minutes
	@$(PARTS) \
	    "perturbed: $(QUIET) $(NUMERIC) -n 2 --perturb" \
	    "baseline instructions: ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(QUIET) $(NUMERIC) -n 2" \
	    "AVX2: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(QUIET) $(NUMERIC) -n 2" \
	    "two threads: $(TWO_THREADS) $(NUMERIC)"

slow: .venv/dev.stamp  ## the tests that take minutes
	$(QUIET) $(BIN)/pytest -m slow --timeout 3600

faults: .venv/dev.stamp  ## inject 2,000 faults (FAULTS=..., SEED=...), print tried and held by kind: tens of minutes
	$(QUIET) $(BIN)/python tests/campaign --faults $(FAULTS) --seed $(SEED) --jobs $(JOBS)

calibration: .venv/core.stamp  ## the simulations behind docs/statistics.md, written into it: tens of minutes
	$(QUIET) $(BIN)/python benchmarks/gate_calibration.py
	$(QUIET) $(BIN)/python benchmarks/calibration.py
	$(QUIET) $(BIN)/python benchmarks/flag_calibration.py
	$(QUIET) $(BIN)/python benchmarks/plan_calibration.py

bench: .venv/core.stamp  ## the measurements in benchmarks/ that take minutes, printed
	@for name in sampling overhead board hostile_server; do echo "== benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py" || exit 1; done

board: .venv/core.stamp  ## make leaderboards/tiny.* and short.* anew, from a clean tree: hours
	$(QUIET) $(BIN)/gpobench compare $(SHORT) --jobs $(JOBS) --out runs/short
	$(QUIET) $(BIN)/gpobench compare $(FULL) --jobs $(JOBS) --out runs/tiny
	$(BIN)/gpobench regress runs/short --against leaderboards/short.toml --update --margin 25%
	$(BIN)/gpobench regress runs/tiny --against leaderboards/tiny.toml --update --margin 50%
	$(BIN)/python benchmarks/seed_library.py
	$(BIN)/python benchmarks/own_numbers.py

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

# pip is in place only when the environment was created whole.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "gpobench needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/core.stamp: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing gpobench into .venv (several minutes the first time)"
	$(BIN)/pip install -q -c constraints.txt setuptools
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	@touch $@

.venv/dev.stamp: .venv/core.stamp
	@echo "installing the dev tools into .venv"
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@
