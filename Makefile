# Two commands set everything up on a fresh machine: `make demo` and `make test`. Each makes the environment that it needs, once.
PYTHON ?= python3
VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALL := $(UV) pip install --quiet
PARALLEL := -n auto --maxprocesses=4 --dist=worksteal

LIBRARIES := gemma tunix penzai levanter
PEER_saelens := sae-lens==6.54.12
PEER_sparsify := eai-sparsify==1.3.3
PEER_repeng := repeng==0.4.0

.PHONY: demo test test-fast test-slow test-newest test-patches test-vocabularies lint format docs docs-serve bench bench-models bench-sae bench-activations bench-attribution bench-steering bench-tpu studies-sae constraints clean

demo: $(VENV)/.demo ## the whole idea at work on SmolLM2-135M; writes demo/index.html
	$(BIN)/interp-jax demo --resume

test: test-fast test-slow ## every test that needs no accelerator

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(VENV)/.dev
	XLA_FLAGS= $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile -m slow # compiled with optimisation

test-newest: ## the fast tests on the newest JAX, where a Python of at least 3.12 is found
	@python=$$(sh .ci/newest-python); \
	if [ -z "$$python" ]; then echo "No Python >= 3.12 found: the fast tests were not run on the newest JAX."; exit 0; fi; \
	set -e; \
	if [ ! -x $(NEWEST)/bin/python ]; then "$$python" -m venv $(NEWEST); $(NEWEST)/bin/python -m pip install --quiet uv; fi; \
	$(NEWEST)/bin/uv pip install --quiet --upgrade --python $(NEWEST)/bin/python -e '.[dev]'; \
	$(NEWEST)/bin/interp-jax data get wikipedia; \
	$(NEWEST)/bin/python -c "import jax, sys; print('JAX', jax.__version__, 'on Python', sys.version.split()[0])"; \
	$(NEWEST)/bin/python -m pytest $(PARALLEL) -m "not slow and not demo"

test-patches: $(LIBRARIES:%=test-patches-%) ## the patch sets of libraries that need an environment of their own, one after another

test-patches-%: .venv-patches/%/.done .venv-patches/references/smollm2.npz
	.venv-patches/$*/bin/python -m pytest tests/patching/libraries/test_$*.py

test-patches-gemma test-patches-tunix: .venv-patches/references/gemma3-sites.npz

test-vocabularies: $(VENV)/.dev .cache/vocabularies/.done ## tokenizers from GGUF files, by the ids that llama.cpp records
	$(BIN)/python -m pytest tests/models/test_gguf_vocabularies.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

bench: $(VENV)/.dev ## benchmarks, each beside its peer
	$(BIN)/python -m benchmarks.instrument
	$(BIN)/python -m benchmarks.pursuit

bench-models: $(VENV)-peers/.done ## our transformer beside PyTorch's and Flax's
	$(VENV)-peers/bin/python -W ignore -m benchmarks.models

bench-sae: $(VENV)/.dev $(VENV)-saelens/.done $(VENV)-sparsify/.done ## training steps beside SAELens' and sparsify's
	$(BIN)/python -W ignore -m benchmarks.sae
	$(BIN)/python -W ignore -m benchmarks.sae.text_to_sae

studies-sae: $(VENV)/.dev ## claims about training dictionaries, tried on the tiny model: numbers and figures of docs/dictionary_studies.md
	for study in beta1 ghost test_time_l0; do $(BIN)/python -W ignore -m benchmarks.sae.studies $$study || exit; done

bench-activations: $(VENV)/.dev ## the store of activations beside plain file copy
	$(BIN)/python -m benchmarks.activations

bench-attribution: $(VENV)-peers/.done ## attribution in passes, and patching beside nnsight and PyTorch
	$(VENV)-peers/bin/python -W ignore -m benchmarks.attribution

bench-steering: $(VENV)/.dev $(VENV)-repeng/.done ## steered decoding beside plain decoding and beside repeng
	$(BIN)/python -W ignore -m benchmarks.steering

bench-tpu: $(VENV)-tpu/.done ## compiled ahead of time for TPUs: the layer scan, and whether large models and autoencoders fit; needs none
	$(VENV)-tpu/bin/python -m benchmarks.instrument.tpu
	$(VENV)-tpu/bin/python -W ignore -m benchmarks.models.large
	$(VENV)-tpu/bin/python -W ignore -m benchmarks.sae.large
	$(VENV)-tpu/bin/python -W ignore -m benchmarks.pursuit.large

constraints: $(VENV)/.uv ## pins every dependency anew; no addresses
	$(UV) pip compile --quiet --python-version 3.11 --no-emit-index-url --no-header --upgrade \
	  --extra demo --extra dev --extra docs -o constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-tpu $(VENV)-peers $(VENV)-saelens $(VENV)-sparsify $(VENV)-repeng $(VENV)-patches $(NEWEST) site dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.uv:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "interp_jax needs Python >= 3.11, but $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.11 demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.uv
	$(INSTALL) --python $(BIN)/python -c constraints.txt -e '.[demo]'
	$(BIN)/interp-jax data get smollm2
	$(BIN)/interp-jax data get wikipedia
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) --python $(BIN)/python -c constraints.txt -e '.[demo,dev]'
	@touch $@

# Not in $(VENV): where libtpu is installed, JAX looks for a TPU whenever it starts.
$(VENV)-tpu/.done: pyproject.toml constraints.txt $(VENV)/.uv
	$(UV) venv --quiet --clear --python $(BIN)/python $(VENV)-tpu
	$(INSTALL) --python $(VENV)-tpu/bin/python -c constraints.txt -e '.[tpu]'
	@touch $@

# Peers that can share no environment with ours, nor with one another.
$(VENV)-saelens/.done $(VENV)-sparsify/.done $(VENV)-repeng/.done: $(VENV)-%/.done: $(VENV)/.uv
	$(UV) venv --quiet --clear --python $(BIN)/python $(VENV)-$*
	$(INSTALL) --python $(VENV)-$*/bin/python torch==2.13.0 $(PEER_$*)
	@touch $@

# What a library declares is often far more than its models need: such are installed alone, what they need beside them.
LISTS := tests/patching/libraries/environments
.PRECIOUS: .venv-patches/%/.done # or make deletes it as a step between, and makes the environment anew the next time
.venv-patches/%/.done: pyproject.toml $(LISTS)/%.txt $(LISTS)/%.alone.txt $(VENV)/.uv
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-patches/$*
	$(INSTALL) --python .venv-patches/$*/bin/python -e . pytest pytest-timeout beartype -r $(LISTS)/$*.txt
	$(INSTALL) --python .venv-patches/$*/bin/python --no-deps -r $(LISTS)/$*.alone.txt
	@touch $@

# Not made anew whenever an environment is: they hold what models computed, not how.
.venv-patches/references/smollm2.npz: | $(VENV)/.demo
	JAX_PLATFORMS=cpu $(BIN)/python -W ignore tests/patching/libraries/real_weights.py smollm2

.venv-patches/references/gemma3.npz: | $(VENV)/.demo
	$(BIN)/interp-jax data get gemma3
	JAX_PLATFORMS=cpu $(BIN)/python tests/patching/libraries/real_weights.py gemma3-weights

.venv-patches/references/gemma3-sites.npz: .venv-patches/references/gemma3.npz | .venv-patches/gemma/.done
	JAX_PLATFORMS=cpu .venv-patches/gemma/bin/python -W ignore tests/patching/libraries/gemma3_270m.py

# The files lie in a source distribution, which is not built; pip asks its build system for the metadata all the same.
LLAMA_CPP := llama_cpp_python-0.3.16
.cache/vocabularies/.done: | $(VENV)/.uv
	rm -rf .cache/vocabularies .cache/llama-cpp && mkdir -p .cache/vocabularies
	$(UV) venv --quiet --seed --python $(BIN)/python .cache/llama-cpp
	.cache/llama-cpp/bin/python -m pip install --quiet scikit-build-core
	.cache/llama-cpp/bin/python -m pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-python \
	  --dest .cache/llama-cpp $(subst llama_cpp_python-,llama-cpp-python==,$(LLAMA_CPP))
	tar xzf .cache/llama-cpp/$(LLAMA_CPP).tar.gz -C .cache/vocabularies --strip-components=4 \
	  --wildcards '*/vendor/llama.cpp/models/ggml-vocab-*'
	rm -rf .cache/llama-cpp
	@touch $@

# PyTorch is large and has no place in an environment where JAX is tested.
$(VENV)-peers/.done: pyproject.toml constraints.txt $(VENV)/.uv
	$(UV) venv --quiet --clear --python $(BIN)/python $(VENV)-peers
	$(INSTALL) --python $(VENV)-peers/bin/python -c constraints.txt -e '.[demo,peers]'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(VENV)-peers/bin/interp-jax data get smollm2
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(INSTALL) --python $(BIN)/python -c constraints.txt -e '.[demo,docs]'
	@touch $@
