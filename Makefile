# Each target is a line that a person would type anyway; the environment in .venv is made once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
BASE ?= main
# Most tests keep one core busy, some wait: one process more than cores, at most four. A file's tests share what they set up.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
SIDE_BY_SIDE ?= -n $(WORKERS) --dist loadfile
# Threads of tests and benchmarks wait asleep, since several processes share the cores. mae-ast-fast decides for itself.
test test-ci test-all test-gpu-env bench bench-compare quality: export OMP_WAIT_POLICY ?= PASSIVE

# A GPU machine's versions, and the tests that matter there.
GPU_VENV ?= .venv-gpu
GPU_PYTHON ?= python3.12
GPU_PACKAGES = torch==2.11.0 triton==3.6.0 "numpy>=2.4" "transformers>=5" "hypothesis>=6.100" "pytest>=8" \
  "pytest-benchmark>=5" "pytest-timeout>=2.3" "pytest-xdist>=3.6"
GPU_TESTS = interpreter policy add_layer_norm bias_gelu feed_forward gather_patches info_nce masked_mse sample_mask \
  scatter_tokens short_attention clear_padding model_triton golden undefined_memory attention flash packed_sizes train_step import \
  doctor datasets benchmarks fbank called_modules fake_cuda gpu_first

.PHONY: gpu-env test-gpu-env pretrain test test-ci test-all kernels bench bench-compare quality peers gpu gpu-full lint clean

pretrain: $(VENV)/train.done
	$(BIN)/mae-ast-fast pretrain --config recipes/quick.yaml $(ARGS)

test: $(VENV)/test.done
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-ci: $(VENV)/test.done
	$(BIN)/python -m pytest -m ci $(SIDE_BY_SIDE) $(ARGS)

test-all: $(VENV)/test.done
	$(BIN)/python -m pytest -m "" --timeout 3600 --results tests/results/test-all.txt $(ARGS)

kernels: $(VENV)/test.done
	$(BIN)/mae-ast-fast kernels $(ARGS)

# This machine's tables and figures, in runs/bench/report.md: some 25 minutes on two cores.
bench: $(VENV)/bench.done
	mkdir -p runs/bench
	for name in step ops masking data; do \
	  $(BIN)/python -m pytest benchmarks/bench_$$name.py --benchmark-json=runs/bench/$${name}_cpu.json $(ARGS) || exit 1; \
	done
	$(BIN)/python benchmarks/reports/report.py --results runs/bench

# Is this tree slower than BASE? The benchmarks that its changes touch, of both, in turns.
bench-compare: $(VENV)/test.done
	$(BIN)/python benchmarks/compare.py $(BASE) $(ARGS)

# The paper's experiments in miniature, cell by cell: hours; --quick a quarter of one, --minutes N begins none after that.
quality: $(VENV)/bench.done
	$(BIN)/python benchmarks/studies/quality/run.py $(ARGS)
	$(BIN)/python benchmarks/studies/quality/report.py

# Frozen networks out of public wheels on the same tasks; 50 MB to download, licences in benchmarks/studies/quality/peers.txt.
peers: $(VENV)/peers.done
	$(BIN)/python benchmarks/studies/quality/peers.py $(ARGS)
	$(BIN)/python benchmarks/studies/quality/report.py

# With the Python at hand: GPU machines come with a torch of their own. Installs nothing, needs no network.
# The most useful numbers first, in at most nine minutes, into benchmarks/results/gpu.
gpu:
	$(PYTHON) benchmarks/gpu_first.py $(ARGS)

# Every test on the GPU, memcheck and all benchmarks: up to 40 minutes.
gpu-full:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

# The versions of the GPU machines (Python 3.12, torch 2.11, triton 3.6, NumPy 2.4 or later), without lhotse, soundfile and
# flash-attn. CI does not run it: 3 GB to download.
gpu-env: $(GPU_VENV)/gpu.done

# The tests that matter on a GPU machine, under Triton's interpreter and on the fake GPU.
test-gpu-env: $(GPU_VENV)/gpu.done
	$(GPU_VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(foreach name,$(GPU_TESTS),$(shell find tests -name test_$(name).py)) $(ARGS)
	$(GPU_VENV)/bin/python -m pytest -m ci $(shell find tests -name test_cuda_host_path.py -o -name test_gpu_first.py) $(ARGS)

$(GPU_VENV)/gpu.done: pyproject.toml setup.py
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check -q $(GPU_PACKAGES) -e .
	touch $@

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/meta/lint_calls.py
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/pip.done:
	$(PYTHON) -m venv $(VENV) || { echo "no virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	touch $@

$(VENV)/%.done: pyproject.toml setup.py constraints.txt | $(VENV)/pip.done
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[$*]"
	touch $@
