# `make demo` and `make test` need nothing but python3 (3.11 or 3.12): each sets up .venv on first use.
#   PYTHON=...       which interpreter to build .venv from
#   JOBS=...         how many processes `make test` runs (default 2: Triton's interpreter keeps one core each)
#   TORCH_SPEC=...   which torch to install (default: keep the one PYTHON has, else torch==2.13.0)

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
# Spinning OpenMP workers starve the rest of a small machine.
export OMP_WAIT_POLICY ?= PASSIVE
CSRC := $(shell find csrc -name '*.[ch]*')

.PHONY: demo test test-distributed test-vllm ext long perf lint types compile wheel clean

demo: .venv/ready ext
	$(BIN)/dppo demo

test: .venv/ready ext
	$(BIN)/python -m pytest -m "not long and not perf and not distributed" --numprocesses $(JOBS) --dist worksteal

# Heads shared out over ranks, and trainers under DDP, FSDP2 and DeepSpeed: groups of processes over gloo.
test-distributed: .venv/ready .venv/engines ext
	$(BIN)/python -m pytest -m distributed --numprocesses $(JOBS) --dist loadscope

# Rollouts by a real vLLM engine on CPU, in an environment of its own (2.1 GB). Fails where nothing ran.
test-vllm: .venv-vllm/ready
	DPPO_REQUIRE_VLLM=1 .venv-vllm/bin/python -m pytest tests/vllm -m vllm

# Learning on several seeds with its controls; writes docs/results/.
long: .venv/ready ext
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -m long -s

# Every provider timed (benchmarks/results/), then the speed gates against TRL.
perf: .venv/ready ext
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m pytest -m perf -s

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy knows no package-dir: it sees the installed layout through links.
types: .venv/ready
	rm -rf build/types && mkdir -p build/types/dppo_kernels
	ln -s $(CURDIR)/dppo_kernels/* build/types/dppo_kernels/
	ln -s $(CURDIR)/trainers build/types/dppo_kernels/trainers
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p dppo_kernels

# Every Triton kernel ahead of time; fails on spills, too much shared memory, or a GEMM without wgmma on sm_90.
compile: .venv/ready
	$(BIN)/python -m benchmarks compile

wheel: .venv/ready
	rm -rf dist build/lib* build/bdist* build/temp*
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv .venv-vllm build dist outputs *.egg-info dppo_kernels/*.so dppo_kernels/_build.json

# Installing builds the extensions; this builds them again where their sources have changed since.
ext: .venv/extensions

.venv/extensions: $(CSRC) | .venv/ready
	$(BIN)/python setup.py -q build_ext --inplace
	@test ! -e dppo_kernels/_C.abi3.so || touch $@

.venv-vllm/ready: .ci/venv-vllm .ci/vllm-cpu.txt
	PYTHON="$(PYTHON)" TORCH_SPEC="$(TORCH_SPEC)" bash .ci/venv-vllm
	touch $@

# DeepSpeed compiles nothing here; its setup wants the torch that is there.
.venv/engines: .venv/ready
	DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-build-isolation "deepspeed>=0.18"
	touch $@

.venv/ready: pyproject.toml setup.py .ci/venv
	PYTHON="$(PYTHON)" TORCH_SPEC="$(TORCH_SPEC)" bash .ci/venv
	touch $@
