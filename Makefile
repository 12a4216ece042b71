# Two commands matter: `make export MODEL=internvl` and `make test`. Each sets up all that it needs on a
# bare Debian machine (compiler, .venv, pinned packages, headers, native build) and reuses it afterwards.

MODEL      ?= internvl
CHECKPOINT ?=
PACK       ?=
PRECISION  ?=
CONFIG     ?= configs/smol-small.yaml
OUTPUT     ?= bundles/$(if $(CHECKPOINT),$(notdir $(CHECKPOINT)),smol-$(MODEL))
PYTHON     ?= python3
PYTEST_ARGS ?=

VENV    := .venv
BIN     := $(VENV)/bin
STAMPS  := build/stamps
SOURCES := $(shell find csrc cmake CMakeLists.txt pyproject.toml -type f 2>/dev/null)
PACKAGE := $(shell find python export -type f -not -name '*.pyc' 2>/dev/null)

export HF_HUB_OFFLINE ?= $(if $(CHECKPOINT),0,1)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup export pack scenes smol-saes smol-scenes test test-saelens test-inspect test-lmeval \
        test-tensorrt test-ray lint format bench bench-peers wheel clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 16

setup: $(STAMPS)/install ## compiler, virtual environment, headers, native build

$(STAMPS)/system: scripts/bootstrap.sh
	@mkdir -p $(STAMPS)
	bash scripts/bootstrap.sh $(PYTHON)
	@touch $@

$(STAMPS)/venv: constraints.txt requirements-dev.txt $(STAMPS)/system
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/pip_retry.py install -q -c constraints.txt torch numpy
	$(BIN)/python scripts/pip_retry.py install -q -c constraints.txt -r requirements-dev.txt
	@touch $@

$(STAMPS)/headers: cmake/fetch_onnxruntime_headers.sh cmake/fetch_tensorrt_headers.py $(STAMPS)/venv
	@mkdir -p $(STAMPS)
	bash cmake/fetch_onnxruntime_headers.sh
	$(BIN)/python cmake/fetch_tensorrt_headers.py
	@touch $@

# The editable install compiles the native libraries; Python files are used where they stand.
$(STAMPS)/install: $(STAMPS)/venv $(STAMPS)/headers $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

export: $(OUTPUT)/manifest.json ## export MODEL (CHECKPOINT, PACK, PRECISION, OUTPUT) and verify the bundle
	$(BIN)/daco-rt verify $(OUTPUT)

$(OUTPUT)/manifest.json: $(STAMPS)/install $(PACKAGE)
	$(BIN)/python -m daco_rt.export --model $(MODEL) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) \
	  $(if $(PACK),--pack $(PACK)) $(if $(PRECISION),--precision $(PRECISION)) --output $(OUTPUT) --force

pack: $(STAMPS)/install ## build CONFIG: concepts, texts, dictionary and pack, under builds/
	$(BIN)/daco-rt build $(CONFIG)

SCENES := builds/scenes

scenes: $(SCENES)/done ## the pictures and SAEs of configs/evaluate-scenes*.yaml, in builds/scenes

$(SCENES)/done: $(STAMPS)/install
	rm -rf $(SCENES)
	$(BIN)/daco-rt scenes --described-by scenes-internvl --output $(SCENES)/test
	$(BIN)/daco-rt scenes --seed 7 --count 500 --described-by scenes-internvl --output $(SCENES)/fresh
	$(BIN)/daco-rt scenes --form mm-safetybench --count 30 --output $(SCENES)/mm-safetybench
	$(BIN)/daco-rt scenes --form jailbreakv --count 60 --output $(SCENES)/jailbreakv
	$(BIN)/python scripts/build_scenes_concepts.py --output $(SCENES)/dictionary --rows $(SCENES)/rows
	for seed in 0 1 2; do for init in dictionary random; do \
	  hold=$$([ $$init = random ] || echo --hold); \
	  $(BIN)/daco-rt sae --store $(SCENES)/rows --blocks 3 --dictionary $(SCENES)/dictionary --init $$init $$hold \
	    --latents 202 --k 4 --steps 500 --batch 256 --seed $$seed --output $(SCENES)/trained/$$init-$$seed && \
	  $(BIN)/daco-rt annotate $(SCENES)/trained/$$init-$$seed/block-003 --dictionary $(SCENES)/dictionary \
	    --rule nearest --eta 0.5 --output $(SCENES)/saes/$$init-$$seed || exit 1; \
	done; done
	@touch $@

SMOL_SAES := builds/smol-saes-held

smol-saes: $(SMOL_SAES)/done ## the SAEs of configs/evaluate-smol-saes.yaml, in builds/smol-saes-held

$(SMOL_SAES)/done: $(STAMPS)/install
	$(BIN)/daco-rt build configs/smol-saes-held.yaml
	for run in dictionary-1 dictionary-2 random-0; do \
	  init=$${run%-*}; hold=$$([ $$init = random ] || echo --hold); \
	  $(BIN)/daco-rt sae --store $(SMOL_SAES)/activations --blocks 15-19 --dictionary $(SMOL_SAES)/dictionary \
	    --init $$init $$hold --latents 1756 --k 2 --steps 500 --batch 512 --precision bf16 --seed $${run#*-} --resume \
	    --output $(SMOL_SAES)/trained/$$run || exit 1; \
	  for block in 015 016 017 018 019; do \
	    $(BIN)/daco-rt annotate $(SMOL_SAES)/trained/$$run/block-$$block --dictionary $(SMOL_SAES)/dictionary \
	      --rule nearest --eta 0.4 --output $(SMOL_SAES)/labelled-$$run/$$block --force || exit 1; \
	  done; \
	done
	@touch $@

smol-scenes: builds/smol-scenes-test/done ## the pictures and the dictionary of configs/evaluate-smol-scenes.yaml

builds/smol-scenes-test/done: $(STAMPS)/install
	rm -rf builds/smol-scenes-test builds/scene-pairs
	$(BIN)/daco-rt scenes --form pairs --count 12 --output builds/scene-pairs
	$(BIN)/daco-rt build configs/smol-scenes.yaml
	$(BIN)/daco-rt scenes --seed 11 --count 520 --described-by smol-internvl --output builds/smol-scenes-test
	@touch $@

test: $(STAMPS)/install ## every test that needs no GPU
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# sae-lens brings a hundred packages, so it gets an environment of its own.
test-saelens: $(STAMPS)/install $(STAMPS)/saelens ## test SAE folders against the real sae-lens, both ways
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/parity/test_saelens.py

$(STAMPS)/saelens: constraints.txt scripts/pip_retry.py
	test -x .venv-saelens/bin/python || $(PYTHON) -m venv .venv-saelens
	.venv-saelens/bin/python scripts/pip_retry.py install -q torch==2.13.0 sae-lens==6.54.12
	@touch $@

# Inspect holds two packages at other versions than ours, and lm-evaluation-harness brings sixty, so they lie in
# front of our environment, not in it.
OUR_SITE = import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))

test-inspect: $(STAMPS)/install $(STAMPS)/inspect ## tasks, scorers and the model provider in the real Inspect
	.venv-inspect/bin/python -m pytest $(PYTEST_ARGS) tests/e2e/test_inspect.py

$(STAMPS)/inspect: constraints.txt scripts/pip_retry.py
	test -x .venv-inspect/bin/python || $(PYTHON) -m venv .venv-inspect
	.venv-inspect/bin/python scripts/pip_retry.py install -q inspect-ai==0.3.285 numpy==2.4.6
	$(BIN)/python -c '$(OUR_SITE)' > "$$(.venv-inspect/bin/python -c \
	  'import sysconfig; print(sysconfig.get_path("purelib"))')/daco_rt_base.pth"
	@touch $@

test-lmeval: $(STAMPS)/install $(STAMPS)/lmeval ## the model daco in the real lm-evaluation-harness
	.venv-lmeval/bin/python -m pytest $(PYTEST_ARGS) tests/e2e/test_lm_eval.py tests/e2e/test_paper_table.py

$(STAMPS)/lmeval: constraints.txt scripts/pip_retry.py
	test -x .venv-lmeval/bin/python || $(PYTHON) -m venv .venv-lmeval
	.venv-lmeval/bin/python scripts/pip_retry.py install -q lm_eval==0.4.13 numpy==2.4.6
	$(BIN)/python -c '$(OUR_SITE)' > "$$(.venv-lmeval/bin/python -c \
	  'import sysconfig; print(sysconfig.get_path("purelib"))')/daco_rt_base.pth"
	@touch $@

# NVIDIA's lean runtime and TensorRT-RTX (140 MB), for tests alone: they run without a GPU.
TENSORRT_WHEELS := tensorrt-lean-cu13-bindings==11.4.0.106 tensorrt-lean-cu13-libs==11.4.0.106 \
                   tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116

test-tensorrt: $(STAMPS)/install ## the plugin in NVIDIA's lean runtime, exported graphs in TensorRT-RTX
	$(BIN)/python scripts/pip_retry.py install -q --no-deps --upgrade --target build/deps/tensorrt-wheels \
	  $(TENSORRT_WHEELS)
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/native/test_tensorrt_plugin.py tests/e2e/test_tensorrt_rtx.py

# Ray and its thirty packages (600 MB) stay out of our own environment.
test-ray: $(STAMPS)/install $(STAMPS)/ray ## the harvest on two workers of a local Ray
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/unit/test_dictionary_ray.py

$(STAMPS)/ray: constraints.txt scripts/pip_retry.py
	$(BIN)/python scripts/pip_retry.py install -q -c constraints.txt --upgrade --target build/ray-wheels \
	  'ray[data]==2.60.0'
	@touch $@

lint: $(STAMPS)/install ## ruff, mypy, import-linter, clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python scripts/assembled_package.py mypy
	$(BIN)/python scripts/assembled_package.py layers
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh')

format: $(STAMPS)/venv ## rewrite the sources in the house format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh')

bench: bench-peers ## the CPU benchmarks; results as JSON under benchmarks/results
	$(BIN)/python benchmarks/operator_cpu.py
	$(BIN)/python benchmarks/smol_steered.py
	$(BIN)/python benchmarks/export_memory.py

bench-peers: $(STAMPS)/install $(STAMPS)/peers ## the part of them that compares with other libraries
	$(BIN)/python benchmarks/peers_cpu.py

# What we are compared with stays out of our own environment.
$(STAMPS)/peers: benchmarks/peers/requirements.txt constraints.txt scripts/pip_retry.py
	@mkdir -p $(STAMPS)
	test -x build/peers-venv/bin/python || $(PYTHON) -m venv build/peers-venv
	build/peers-venv/bin/python scripts/pip_retry.py install -q -c constraints.txt torch numpy
	build/peers-venv/bin/python scripts/pip_retry.py install -q -c constraints.txt -r benchmarks/peers/requirements.txt
	@touch $@

# Every generation of GPUs that the toolkit knows; compiling them takes a while.
wheel: $(STAMPS)/install ## a wheel in dist/ for Ampere, Ada, Hopper and Blackwell
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -C 'cmake.define.DACO_RT_CUDA_ARCHS=80;89;90a;100;120' \
	  -C build-dir=build/wheel -w dist .

clean: ## remove what was built (models and bundles stay)
	rm -rf build $(VENV) .venv-saelens .venv-inspect .venv-lmeval .pytest_cache .mypy_cache .ruff_cache
