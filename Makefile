# `make` prints what there is. Every target sets up .venv when it is absent or incomplete.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON_OF_VENV := .venv/bin/python

.PHONY: help
help:  ## Show the targets and what they do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[36mmake %-20s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup:  ## Make .venv with the pinned packages (GPU=1 adds transformer-engine); again: nothing to do
	@launch/setup.sh

.PHONY: quickstart
quickstart: setup  ## From text and a toy Ministral 3 to a tri-mode checkpoint, on two CPU cores (10 minutes)
	$(PYTHON_OF_VENV) -m launch.quickstart

# One thread per process: the tests start several on few cores, and threads that wait for a core spin.
.PHONY: test test-slow test-gpu test-kernels
test: export OMP_NUM_THREADS := 1
test: setup  ## The test suite, two files at a time (TESTS=path or -k expression narrows it)
	$(PYTHON_OF_VENV) -m pytest -n 2 --dist loadfile $(TESTS)

test-slow: export OMP_NUM_THREADS := 1
test-slow: setup  ## The tests that take longer than the suite allows
	$(PYTHON_OF_VENV) -m pytest -m slow $(TESTS)

.PHONY: test-slurm
test-slurm: export OMP_NUM_THREADS := 1
test-slurm: setup  ## The launch scripts on a real Slurm of their own: installed, run, removed (root; 8 minutes; in test-slow)
	$(PYTHON_OF_VENV) -m pytest -m slow -rs tests/launch/slurm $(TESTS)

test-gpu: setup  ## The tests that need a CUDA device
	$(PYTHON_OF_VENV) -m pytest -m gpu $(TESTS)

test-kernels: export OMP_NUM_THREADS := 1
test-kernels: setup  ## Every kernel compiled for H100 and B200 and interpreted, without a GPU (30 minutes of CPU time, two processes; in test-slow; ARGS=--write: new tables)
	$(PYTHON_OF_VENV) -m tests.kernels $(ARGS)

.PHONY: check format
check: setup  ## Lint, formatting and types
	$(PYTHON_OF_VENV) -m ruff check .
	$(PYTHON_OF_VENV) -m ruff format --check .
	$(PYTHON_OF_VENV) -m pyright

format: setup  ## Rewrite the sources the way `make check` wants them
	$(PYTHON_OF_VENV) -m ruff check --fix .
	$(PYTHON_OF_VENV) -m ruff format .

.PHONY: convert-checkpoint
convert-checkpoint: setup  ## FROM=... TO=... [PARALLEL=tensor_parallel=2] [VISION=...]: Hugging Face <-> Megatron, whichever FROM is; VISION: give it a tower
	@[ -n "$(FROM)" ] && [ -n "$(TO)" ] || { echo "give FROM=<checkpoint> TO=<new directory> [PARALLEL=tensor_parallel=2] [VISION=<Ministral 3>]" >&2; exit 2; }
	$(PYTHON_OF_VENV) -m model.convert --from "$(FROM)" --to "$(TO)" $(if $(PARALLEL),--parallel $(PARALLEL)) $(if $(VISION),--vision "$(VISION)")

.PHONY: prepare-data
prepare-data: setup  ## CONFIG=<option of conf/data> [ARGS="data.tokenizer=..."]: tokenise its sources on all cores
	@[ -n "$(CONFIG)" ] || { echo 'give CONFIG=<option of conf/data> [ARGS="data.tokenizer=... data.train...."]' >&2; exit 2; }
	$(PYTHON_OF_VENV) -m data_pipeline.prepare data="$(CONFIG)" $(ARGS)

.PHONY: bench-data
bench-data: setup  ## Benchmarks of tokenisation, loader and memory (5 minutes), into runs/bench/data.json
	$(PYTHON_OF_VENV) -m tests.bench.bench_data

.PHONY: bench-drafter
bench-drafter: setup  ## Objectives of the draft adapter compared (40 minutes, and once 20 for a model), into runs/bench/drafter.json
	$(PYTHON_OF_VENV) -m tests.bench.bench_drafter $(ARGS)

.PHONY: bench-decode
bench-decode: export OMP_NUM_THREADS := 1
bench-decode: setup  ## Benchmark of the decoding modes (20 minutes), into runs/bench/decode.json and .png (ARGS="--quick")
	$(PYTHON_OF_VENV) -m tests.bench.bench_decode $(ARGS)

.PHONY: bench-joint
bench-joint: export OMP_NUM_THREADS := 1
bench-joint: export PYTHONWARNINGS := ignore
bench-joint: setup  ## Benchmark of the joint step on one thread (10 minutes), into runs/bench/joint.json (ARGS="--quick")
	$(PYTHON_OF_VENV) -m tests.bench.bench_joint $(ARGS)

.PHONY: bench-images
bench-images: export OMP_NUM_THREADS := 1
bench-images: setup  ## What leaving images out of the noisy half saves, on one thread (1 minute)
	$(PYTHON_OF_VENV) -m tests.bench.bench_images

.PHONY: bench-gpu
bench-gpu: setup  ## The 8B-shaped step on one GPU against the public recipe (8 minutes), into runs/bench/gpu.json (ARGS="--toy": any device)
	$(PYTHON_OF_VENV) -m tests.bench.bench_gpu $(ARGS)

.PHONY: bench
bench: bench-data bench-joint bench-images bench-decode bench-drafter chaos  ## Every benchmark that needs no GPU (2 hours)

.PHONY: chaos
chaos: export OMP_NUM_THREADS := 1
chaos: setup  ## Kill a toy run 50 times, damage 130 checkpoint files (15 minutes), into runs/bench/chaos.json (ARGS="--kills 3")
	$(PYTHON_OF_VENV) -m tests.bench.chaos $(ARGS)

.PHONY: clean
clean:  ## Delete caches and build leftovers; .venv and runs/ stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache build ./*.egg-info
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
