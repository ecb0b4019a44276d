PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := build/demo
GPU_VENV := build/gpu-venv
LOCK_VENV := build/lock-venv
# Python 3.11 on Linux (x86-64) gets the very files whose hashes the lock holds, all others what
# pyproject.toml allows; so does whoever says `make test LOCK=`.
LOCK ?= requirements/dev.txt
LOCKABLE := $(shell $(PYTHON) -c 'import platform as p, sys; \
	print(sys.version_info[:2] == (3, 11) and (p.system(), p.machine()) == ("Linux", "x86_64"))')
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# pip compiles one module after the other; here every CPU does, and leaves out what is hardly imported.
# Some packages hold templates that are no Python: those fail, as they do quietly in pip.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' $(VENV)/lib || true

.PHONY: demo test quick lint docs bench fuzz lock gpu-check clean

$(INSTALLED): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
ifeq ($(and $(LOCK),$(LOCKABLE)),True)
	$(PIP) --require-hashes --requirement $(LOCK)
	$(PIP) --no-deps --no-build-isolation --editable .
else
	$(PIP) --upgrade pip
	$(PIP) --editable '.[export,dev]'
endif
	$(COMPILE)
	touch $@

## Resolve what the lock holds anew, for pyproject.toml as it is; with UPGRADE=--upgrade the newest.
lock:
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK_VENV)/bin/uv pip compile --quiet pyproject.toml requirements/build.in \
		--extra export --extra dev --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
		--custom-compile-command 'make lock' $(UPGRADE) --output-file requirements/dev.txt

## Compile the real DINOv2-S for ONNX Runtime on this CPU and print how close it is to PyTorch.
demo: $(INSTALLED)
	$(BIN)/python examples/demo_photos.py $(DEMO)
	$(BIN)/regcache compile sample:dinov2-small --images $(DEMO)/calibration -o $(DEMO)/artifact
	$(BIN)/regcache parity $(DEMO)/artifact --images $(DEMO)/evaluation --min-cosine 0.995

# One thread for each of the two workers. Their large arrays come and go: glibc gives that memory back
# and asks for it anew unless told to keep it, which is a tenth of the time. The many processes that
# tests start need not compile the sources each for itself.
TESTING := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
test: $(INSTALLED)
	$(TESTING) $(BIN)/python -m pytest -n 2 --dist loadgroup

## What needs neither PyTorch, the model zoo, the sample nor an engine, and takes no seconds a test.
quick: $(INSTALLED)
	$(TESTING) $(BIN)/python -m pytest --quick -n 2 --dist loadgroup

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## The documentation as a site in build/site: a link that leads nowhere is an error.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

## Measure what compiling and its results cost, on the demo photographs.
bench: demo
	$(BIN)/python benchmarks/compile_cost.py sample:dinov2-small --images $(DEMO)/calibration
	$(BIN)/python benchmarks/register_cost.py sample:dinov2-small
	$(BIN)/python benchmarks/int8_speed.py $(DEMO)/artifact
	$(BIN)/python benchmarks/parity_cost.py $(DEMO)/artifact --images $(DEMO)/evaluation
	$(BIN)/python benchmarks/embed_cost.py $(DEMO)/artifact --images $(DEMO)/evaluation
	$(BIN)/python benchmarks/curation_cost.py sample:dinov2-small --images $(DEMO)/calibration

## Broken and hostile files, from seed FIRST on: tens of thousands, each with a time and memory limit.
fuzz: FIRST ?= 0
fuzz: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python benchmarks/fuzz.py --first $(FIRST) --json build/fuzz.json

## Everything that needs a GPU: engines, their parity with PyTorch, every runner's speed.
gpu-check:
	@nvidia-smi -L > /dev/null 2>&1 || { echo "gpu-check: no GPU: nvidia-smi finds none"; exit 2; }
	@$(MAKE) --no-print-directory $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python examples/demo_photos.py $(DEMO)
	$(GPU_VENV)/bin/python benchmarks/gpu_check.py \
		--calibration $(DEMO)/calibration --evaluation $(DEMO)/evaluation
	$(GPU_VENV)/bin/python benchmarks/device_cost.py sample:dinov2-small \
		--images $(DEMO)/calibration --evaluation $(DEMO)/evaluation

# An environment of its own: onnxruntime-gpu takes the place of onnxruntime.
$(GPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --editable '.[export,dev,gpu,trt]'
	$(GPU_VENV)/bin/python -m pip uninstall --quiet --yes onnxruntime
	$(GPU_VENV)/bin/python -m pip install --quiet 'onnxruntime-gpu[cuda,cudnn]>=1.24'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
